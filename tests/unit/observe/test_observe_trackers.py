"""Each adapter speaks its tracker's real interface; fakes record the calls of absent ones."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.observe import ObserveSettings, open_sinks
from pipeline.observe.trackers import check_trackers
from stages import distill, sweep


class _Recorder(types.ModuleType):
    """Stands for a tracker's module: remembers every call and returns itself as the run."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.id = "run-id-1"
        self.info = types.SimpleNamespace(run_id="run-id-1")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> _Recorder:
            self.calls.append((name, args, kwargs))
            return self

        return call

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> _Recorder:
    module = _Recorder(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return module


def _two_runs(name: Any, directory: Path) -> None:
    settings = ObserveSettings(report_to=(name,), project_name="p")
    for resume_step in (None, 3):
        sink = open_sinks(settings, directory, resume_step=resume_step, config={"seed": 1})
        sink.log(4, {"train/loss": 0.5})
        sink.close()


@pytest.mark.parametrize("fake", ["wandb"], indirect=True)
def test_wandb_continues_its_entry_and_may_repeat_steps(fake: _Recorder, tmp_path: Path) -> None:
    _two_runs("wandb", tmp_path / "run7")
    (_, first), (_, second) = fake.named("init")
    assert (first["project"], first["name"], first["config"]) == ("p", "run7", {"seed": 1})
    assert (first["id"], first["resume"]) == (None, None)
    assert (second["id"], second["resume"]) == ("run-id-1", "allow")
    assert (("*",), {"step_metric": "step"}) in fake.named("define_metric")
    assert fake.named("log")[0] == (({"train/loss": 0.5, "step": 4},), {})
    assert len(fake.named("finish")) == 2


@pytest.mark.parametrize("fake", ["trackio"], indirect=True)
def test_trackio_is_local_and_continues_by_name(fake: _Recorder, tmp_path: Path) -> None:
    _two_runs("trackio", tmp_path / "run7")
    (_, first), (_, second) = fake.named("init")
    assert (first["resume"], second["resume"]) == ("never", "allow")
    assert "space_id" not in first
    assert first["name"] == second["name"] == "run7"
    assert fake.named("log")[0] == (({"train/loss": 0.5},), {"step": 4})
    assert len(fake.named("finish")) == 2


@pytest.mark.parametrize("fake", ["mlflow"], indirect=True)
def test_mlflow_stays_in_the_output_folder(fake: _Recorder, tmp_path: Path) -> None:
    _two_runs("mlflow", tmp_path / "run7")
    ((uri,), _), *_ = fake.named("set_tracking_uri")
    assert uri == f"sqlite:///{(tmp_path / 'run7' / 'mlflow.db').resolve()}"
    (_, first), (_, second) = fake.named("start_run")
    assert (first["run_id"], first["run_name"]) == (None, "run7")
    assert (second["run_id"], second["run_name"]) == ("run-id-1", None)
    assert fake.named("log_metrics")[0] == (({"train/loss": 0.5},), {"step": 4})


@pytest.mark.parametrize("fake", ["wandb"], indirect=True)
def test_a_tracker_that_does_not_start_warns_and_is_skipped(
    fake: _Recorder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(fake, "init", refuse, raising=False)
    with caplog.at_level(logging.WARNING):
        sink = open_sinks(ObserveSettings(report_to=("wandb",)), tmp_path)
    sink.log(0, {"a": 1.0})
    sink.close()
    assert "tracker wandb did not start and is skipped: RuntimeError: no API key" in caplog.text
    assert (tmp_path / "metrics.jsonl").exists()


def test_tensorboard_hides_what_the_killed_process_wrote(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = ObserveSettings(report_to=("tensorboard",))
    for resume_step, steps in ((None, range(6)), (3, range(4, 8))):
        sink = open_sinks(settings, tmp_path, resume_step=resume_step, config={"seed": 1})
        for step in steps:
            sink.log(step, {"train/loss": float(step)})
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(8))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A tracker of the user's own in accelerate's registry; returns the calls that it gets."""
    from accelerate import tracking

    calls: list[tuple[str, Any]] = []

    class Own(tracking.GeneralTracker):  # type: ignore[misc]
        name = "own_tracker"
        requires_logging_directory = True

        def __init__(self, project: str, folder: str) -> None:
            super().__init__()
            calls.append(("init", (project, folder)))

        @tracking.on_main_process
        def start(self) -> None:
            tracking.logger.debug("starting")
            calls.append(("start", None))

        @property
        def tracker(self) -> Any:
            return self

        @tracking.on_main_process
        def store_init_configuration(self, values: dict[str, Any]) -> None:
            calls.append(("config", values))

        @tracking.on_main_process
        def log(self, values: dict[str, float], step: int | None = None) -> None:
            calls.append(("log", (step, values)))

        @tracking.on_main_process
        def finish(self) -> None:
            calls.append(("finish", None))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "own_tracker", Own)
    return calls


def test_any_tracker_of_accelerates_registry(
    registered: list[tuple[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import PartialState

    monkeypatch.setattr(PartialState, "_shared_state", {})  # another test's model may have set it
    settings = ObserveSettings(report_to=("own_tracker",), project_name="p")
    config = {"seed": 1, "loss": {"temperature": 2.0, "tail": None}, "layers": [1, 2]}
    sink = open_sinks(settings, tmp_path, config=config)
    sink.log(4, {"train/loss": 0.5})
    sink.close()
    assert registered == [
        ("init", ("p", str(tmp_path))),
        ("start", None),
        (
            "config",
            {"seed": 1, "loss.temperature": 2.0, "loss.tail": None, "layers": "[1, 2]"},
        ),
        ("log", (4, {"train/loss": 0.5})),
        ("finish", None),
    ]
    assert not PartialState._shared_state, "accelerate must not set up processes of its own"


def test_a_tracker_that_accelerate_knows_but_is_not_installed(tmp_path: Path) -> None:
    settings = ObserveSettings(report_to=("clearml",))
    with pytest.raises(ConfigError) as caught:
        open_sinks(settings, tmp_path)
    message = str(caught.value)
    assert "report_to: clearml was asked for, but is not installed" in message
    assert "python -m pip install clearml" in message


def test_the_environment_to_install_into_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(sys, "executable", str(Path.cwd() / ".venv-student/bin/python"))
    with pytest.raises(ConfigError) as caught:
        check_trackers(["wandb", "clearml", "tensorboard"])
    message = str(caught.value)
    assert "2 mistakes in the configuration" in message
    assert "run `.venv-student/bin/python -m pip install wandb`, or leave wandb out" in message
    assert "run `.venv-student/bin/python -m pip install clearml`" in message


def test_a_missing_tracker_is_told_before_the_teacher_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(distill.Parts, "stage", lambda *_, **__: pytest.fail("a stage was started"))
    config = tmp_path / "student.yaml"
    config.write_text("observe: {report_to: [wandb]}\n")
    for main, flags in (
        (distill.main, ["--run_dir", str(tmp_path / "run"), "--student_config", str(config)]),
        (sweep.main, ["--sweep", str(_sweep(tmp_path, config)), "--sweep_dir", str(tmp_path)]),
    ):
        with pytest.raises(ConfigError, match="wandb was asked for, but wandb is not installed"):
            main(flags)
    assert not (tmp_path / "run").exists()


def _sweep(folder: Path, base: Path) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(
        f"base: {base}\ncache_dir: {folder}/cache\nteacher_config: {base}\n"
        "grid: {loss.temperature: [1, 2]}\n"
    )
    return file


def test_an_unknown_tracker_lists_the_known_ones(registered: list[tuple[str, Any]]) -> None:
    with pytest.raises(ValidationError) as caught:
        ObserveSettings(report_to=("tensorbord",))
    message = str(caught.value)
    assert "found tensorbord, expected any of aim, clearml, comet_ml" in message
    assert "own_tracker" in message
