"""The metrics file equals that of a run never killed; trackers cannot hurt the run."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, StoreError
from pipeline.observe import METRICS_FILE, ObserveSettings, is_timing, open_sinks, read_metrics
from pipeline.observe.metrics import CompositeSink, JsonLinesSink, MetricRecord, NullSink


class _Tracker:
    def __init__(self, *, fails_at: int | None = None, fails_on_close: bool = False) -> None:
        self.seen: list[int] = []
        self.closed = False
        self._fails_at = fails_at
        self._fails_on_close = fails_on_close

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step == self._fails_at:
            raise ConnectionError("service is down")
        self.seen.append(step)

    def close(self) -> None:
        if self._fails_on_close:
            raise ConnectionError("service is down")
        self.closed = True


def _run(path: Path, steps: range, *, resume_step: int | None = None) -> None:
    sink = JsonLinesSink(path, resume_step=resume_step)
    for step in steps:
        sink.log(step, {"train/loss": 1.0 / (step + 1), "train/kl": step / 3})
        if step % 4 == 0:
            sink.log(step, {"heldout/kl": step / 7})
    sink.close()


def test_lines_are_json_with_step_first_and_sorted_keys(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path / "deep" / "m.jsonl")
    sink.log(3, {"b": 0.1, "a": 1.0})
    # Read before close: every record is handed to the system at once.
    assert (tmp_path / "deep" / "m.jsonl").read_text() == '{"step": 3, "a": 1.0, "b": 0.1}\n'
    sink.close()
    sink.close()


def test_floats_come_back_exactly_and_non_finite_ones_stay_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    values = {"a": 0.1 + 0.2, "b": float("inf"), "c": float("-inf"), "d": 1e-320}
    sink = JsonLinesSink(path)
    sink.log(0, {**values, "e": float("nan")})
    sink.close()
    json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(text))
    (record,) = read_metrics(path)
    assert record.values.pop("e") != 0.0
    assert record.values == values


@pytest.mark.parametrize("killed_after", [5, 6, 8, 11])
@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 1', b'{"step": 12, "train/loss": 0.5}', b"\0\0\0"]
)
def test_resume_gives_the_file_of_a_run_never_killed(
    tmp_path: Path, killed_after: int, torn: bytes
) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    _run(whole, range(20))
    _run(resumed, range(killed_after + 1))
    with resumed.open("ab") as file:
        file.write(torn)
    _run(resumed, range(6, 20), resume_step=5)
    assert resumed.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_that_starts_anew_keeps_nothing_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    _run(path, range(9))
    _run(path, range(3))
    assert [record.step for record in read_metrics(path)] == [0, 0, 1, 2]


def test_an_unreadable_line_inside_the_file_is_removed_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0, "a": 1.0}\nrubbish\n{"step": 1, "a": 2.0}\n')
    with caplog.at_level(logging.WARNING):
        JsonLinesSink(path, resume_step=1).close()
    assert path.read_text() == '{"step": 0, "a": 1.0}\n{"step": 1, "a": 2.0}\n'
    assert "1 unreadable lines" in caplog.text


def test_kill_9_while_logging_loses_no_whole_record(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    program = (
        "import os, signal, sys\n"
        "from pipeline.observe.metrics import JsonLinesSink\n"
        "sink = JsonLinesSink(sys.argv[1])\n"
        "for step in range(50):\n"
        "    sink.log(step, {'a': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert result.returncode == -9
    assert [record.step for record in read_metrics(path)] == list(range(50))


def test_a_file_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(StoreError, match=r"folder\.jsonl"):
        JsonLinesSink(tmp_path / "folder.jsonl")


def test_timing_keys_are_left_out_of_comparisons() -> None:
    record = MetricRecord(
        1, {"train/loss": 1.0, "throughput/tokens_per_s": 9.0, "data/wait_s": 0.1}
    )
    assert record.without_timing() == MetricRecord(1, {"train/loss": 1.0})
    assert is_timing("memory/peak_rss_bytes")
    assert not is_timing("train/data_loss")


def test_a_failing_tracker_warns_once_and_hides_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = _Tracker(fails_on_close=True), _Tracker(fails_at=2)
    path = tmp_path / "m.jsonl"
    sink = CompositeSink(JsonLinesSink(path), {"bad": bad, "good": good})
    with caplog.at_level(logging.WARNING):
        for step in range(6):
            sink.log(step, {"a": 1.0})
    assert caplog.text.count("tracker bad failed") == 1
    assert "ConnectionError: service is down" in caplog.text
    sink.close()
    sink.close()
    assert (good.seen, bad.seen) == (list(range(6)), [0, 1])
    assert [record.step for record in read_metrics(path)] == list(range(6))


def test_only_the_writing_rank_opens_anything(tmp_path: Path) -> None:
    settings = ObserveSettings(report_to=("tensorboard",))
    sink = open_sinks(settings, tmp_path, is_writer=False)
    sink.log(0, {"a": 1.0})
    sink.close()
    assert isinstance(sink, NullSink)
    assert not list(tmp_path.iterdir())


def test_without_trackers_only_the_local_file_is_written(tmp_path: Path) -> None:
    sink = open_sinks(ObserveSettings(), tmp_path / "run", config={"seed": 1})
    sink.log(0, {"a": 1.0})
    sink.close()
    assert [item.name for item in (tmp_path / "run").iterdir()] == [METRICS_FILE]


def test_a_missing_tracker_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="-m pip install wandb"):
        open_sinks(ObserveSettings(report_to=("wandb",)), tmp_path)
    assert not list(tmp_path.iterdir())
