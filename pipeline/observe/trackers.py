"""Experiment trackers, imported when asked for: four that resume, and accelerate's others."""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.observe.accelerate_trackers import (
    check_accelerate_tracker,
    install_advice,
    open_accelerate_tracker,
)
from pipeline.observe.settings import ObserveSettings

__all__ = ["TrackerSink", "check_tracker", "check_trackers", "open_tracker"]

_log = logging.getLogger(__name__)

_RUN_IDS_FILE = "trackers.json"


class TrackerSink:
    """One run in one tracker, behind the two calls that `MetricSink` needs."""

    def __init__(
        self, log: Callable[[int, dict[str, float]], None], close: Callable[[], None]
    ) -> None:
        """Hold the tracker's own two functions."""
        self._log = log
        self._close = close

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of one step."""
        self._log(step, dict(values))

    def close(self) -> None:
        """Let the tracker send what it holds back, and mark the run as finished."""
        self._close()


def open_tracker(
    name: str,
    settings: ObserveSettings,
    directory: Path,
    *,
    resume_step: int | None,
    config: dict[str, Any],
) -> TrackerSink | None:
    """Open the tracker `name`; none, after one warning, if it is installed but does not start.

    With tensorboard, wandb, trackio and mlflow a resumed run continues its old entry: the
    identifiers that trackers give are kept in `trackers.json` in the output folder. Any other
    starts another entry.

    Raises:
        ConfigError: the tracker's package is not installed.
    """
    check_tracker(name)
    opener = _TRACKERS[name][0] if name in _TRACKERS else partial(_open_other, name)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return opener(settings, directory, resume_step, config)
    except Exception as error:
        _log.warning(
            "tracker %s did not start and is skipped: %s: %s", name, type(error).__name__, error
        )
        return None


def check_trackers(names: Sequence[str]) -> None:
    """Reject trackers that cannot be imported here, all at once, before anything else is begun.

    Raises:
        ConfigError: with what is missing, and how to install it.
    """
    mistakes: list[str] = []
    for name in names:
        try:
            check_tracker(name)
        except ConfigError as error:
            mistakes.append(str(error).rstrip("."))
    if mistakes:
        raise ConfigError(mistakes=mistakes)


def check_tracker(name: str) -> None:
    """Reject a tracker that nobody knows, or whose package is missing.

    Raises:
        ConfigError: with what is known, or what to install.
    """
    if name not in _TRACKERS:
        check_accelerate_tracker(name)
        return
    _, module, install = _TRACKERS[name]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"report_to: {name} was asked for, but {error.name or module} is not installed",
            expected="the tracker's package",
            do=f"{install_advice(install)}, or leave {name} out of report_to",
        ) from None


def _open_tensorboard(
    settings: ObserveSettings, directory: Path, resume_step: int | None, config: dict[str, Any]
) -> TrackerSink:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what a killed process wrote after the checkpoint that is resumed.
    purge_step = 0 if resume_step is None else resume_step + 1
    writer: Any = SummaryWriter(log_dir=str(directory / "tensorboard"), purge_step=purge_step)
    if resume_step is None:
        writer.add_text("config", "```json\n" + json.dumps(config, indent=2, default=str) + "\n```")

    def log(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, global_step=step)

    return TrackerSink(log, writer.close)


def _open_wandb(
    settings: ObserveSettings, directory: Path, resume_step: int | None, config: dict[str, Any]
) -> TrackerSink:
    wandb: Any = importlib.import_module("wandb")
    known = _run_id(directory, "wandb", resume_step)
    run = wandb.init(
        project=settings.project_name,
        name=_run_name(settings, directory),
        dir=str(directory),
        config=config,
        id=known,
        resume="allow" if known else None,
    )
    _keep_run_id(directory, "wandb", str(run.id))
    # wandb's own step may only grow, so that the steps repeated after a kill would be rejected;
    # a step of ours as the x axis may repeat.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")

    def log(step: int, values: dict[str, float]) -> None:
        run.log({**values, "step": step})

    return TrackerSink(log, run.finish)


def _open_trackio(
    settings: ObserveSettings, directory: Path, resume_step: int | None, config: dict[str, Any]
) -> TrackerSink:
    trackio: Any = importlib.import_module("trackio")
    # Local by default: one SQLite file; nothing is shown or sent unless TRACKIO_SPACE_ID is set.
    trackio.init(
        project=settings.project_name,
        name=_run_name(settings, directory),
        config=config,
        resume="never" if resume_step is None else "allow",
        embed=False,
    )

    def log(step: int, values: dict[str, float]) -> None:
        trackio.log(values, step=step)

    return TrackerSink(log, trackio.finish)


def _open_mlflow(
    settings: ObserveSettings, directory: Path, resume_step: int | None, config: dict[str, Any]
) -> TrackerSink:
    mlflow: Any = importlib.import_module("mlflow")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        # mlflow's own default is a file in whatever folder the job was started from.
        mlflow.set_tracking_uri(f"sqlite:///{directory.resolve() / 'mlflow.db'}")
    mlflow.set_experiment(settings.project_name)
    known = _run_id(directory, "mlflow", resume_step)
    run = mlflow.start_run(run_id=known, run_name=None if known else _run_name(settings, directory))
    _keep_run_id(directory, "mlflow", str(run.info.run_id))
    if known is None:
        mlflow.log_dict(config, "config.json")

    def log(step: int, values: dict[str, float]) -> None:
        mlflow.log_metrics(values, step=step)

    return TrackerSink(log, mlflow.end_run)


def _open_other(
    name: str,
    settings: ObserveSettings,
    directory: Path,
    resume_step: int | None,
    config: dict[str, Any],
) -> TrackerSink:
    if resume_step is not None:
        _log.info("%s: the resumed run is another entry of the tracker", name)
    tracker = open_accelerate_tracker(
        name,
        project=settings.project_name,
        run_name=_run_name(settings, directory),
        folder=directory,
        config=config,
    )

    def log(step: int, values: dict[str, float]) -> None:
        tracker.log(values, step=step)

    return TrackerSink(log, tracker.finish)


_Opener = Callable[[ObserveSettings, Path, int | None, dict[str, Any]], TrackerSink]

_TRACKERS: dict[str, tuple[_Opener, str, str]] = {
    # name: (opener, module that must import, what pip installs)
    "tensorboard": (_open_tensorboard, "torch.utils.tensorboard", "tensorboard"),
    "wandb": (_open_wandb, "wandb", "wandb"),
    "trackio": (_open_trackio, "trackio", "trackio"),
    "mlflow": (_open_mlflow, "mlflow", "mlflow"),
}


def _run_name(settings: ObserveSettings, directory: Path) -> str:
    return settings.run_name or directory.resolve().name


def _run_id(directory: Path, tracker: str, resume_step: int | None) -> str | None:
    """Return the identifier of the entry to continue; none for a run that is not resumed."""
    if resume_step is None:
        return None
    return _run_ids(directory).get(tracker)


def _keep_run_id(directory: Path, tracker: str, run_id: str) -> None:
    ids = {**_run_ids(directory), tracker: run_id}
    text = json.dumps(ids, indent=2, sort_keys=True) + "\n"
    (directory / _RUN_IDS_FILE).write_text(text, encoding="utf-8")


def _run_ids(directory: Path) -> dict[str, str]:
    try:
        data = json.loads((directory / _RUN_IDS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
