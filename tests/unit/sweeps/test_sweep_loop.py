"""The sweep's loop with real processes: failures, kills, stops, places, searches that go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.sweeps.file import SweepFile
from pipeline.sweeps.ledger import read_inventory
from tests.stage_runner import ROOT
from tests.unit.sweeps.quick_sweep import quick_sweep

pytestmark = pytest.mark.timeout(600)

GRID = {"grid": {"temperature": [1.0, 2.0], "alpha": [0.0, 0.5]}}
SEARCH: dict[str, Any] = {
    "search": {
        "trials": 8,
        "startup_trials": 2,
        "space": {"temperature": {"low": 1, "high": 4}, "alpha": [0.0, 0.5]},
    }
}


def _file(content: dict[str, Any]) -> SweepFile:
    return SweepFile.model_validate(content)


def _starts(folder: Path) -> dict[str, list[int]]:
    """Return by run the step that each of its processes began at."""
    return {
        file.parent.name: [int(line.split()[0]) for line in file.read_text().splitlines()]
        for file in folder.glob("runs/*/starts.log")
    }


class Started:
    """A sweep as a process of its own."""

    def __init__(self, content: dict[str, Any], folder: Path, step_s: float, parallel: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "sweep.yaml"
        path.write_text(yaml.safe_dump(content))
        self.out = folder / "out.log"
        with self.out.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.unit.sweeps.quick_sweep", str(path), str(folder)],
                cwd=ROOT,
                stdout=out,
                stderr=out,
                env={**os.environ, "QUICK_STEP_S": str(step_s), "QUICK_PARALLEL": str(parallel)},
            )

    def wait_for(self, ready: Callable[[], bool], timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not ready():
            assert time.monotonic() < deadline, self.out.read_text()
            assert self.process.poll() is None, self.out.read_text()
            time.sleep(0.02)

    def end(self, timeout_s: float = 240) -> int:
        return self.process.wait(timeout_s)


@pytest.fixture
def begin() -> Iterator[Callable[..., Started]]:
    begun: list[Started] = []

    def start(
        content: dict[str, Any], folder: Path, *, step_s: float = 0.02, parallel: int = 1
    ) -> Started:
        begun.append(Started(content, folder, step_s, parallel))
        return begun[-1]

    yield start
    for one in begun:
        one.process.kill()
        one.process.wait()


def test_every_run_is_done_once_and_the_best_comes_first(tmp_path: Path) -> None:
    sweep, _ = quick_sweep(_file(GRID), tmp_path)
    ledger = sweep.run()
    assert [entry.state for entry in ledger.entries] == ["finished"] * 4
    assert ledger.ranked()[0].label == "temperature 2, alpha 0"
    assert ledger.ranked()[0].objective == pytest.approx(0.0)
    before = _starts(tmp_path)
    said: list[str] = []
    again, _ = quick_sweep(_file(GRID), tmp_path, say=said.append)
    assert again.run() == ledger
    assert _starts(tmp_path) == before, "nothing was started again"
    assert sum("was finished before" in line for line in said) == 4


def test_a_changed_value_is_the_only_new_run(tmp_path: Path) -> None:
    quick_sweep(_file(GRID), tmp_path)[0].run()
    old = _starts(tmp_path)
    changed = {"grid": {"alpha": [0.5, 0.0], "temperature": [2.0, 3.0]}}
    quick_sweep(_file(changed), tmp_path)[0].run()
    new = _starts(tmp_path)
    assert len(new) == 6
    assert {name: new[name] for name in old} == old
    assert all("temperature-3" in name for name in set(new) - set(old))


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    points = {"points": [{"temperature": 1}, {"learning_rate": 5}, {"temperature": 3}]}
    ledger = quick_sweep(_file(points), tmp_path)[0].run()
    assert [entry.state for entry in ledger.entries] == ["finished", "failed", "finished"]
    assert ledger.entries[1].error == "exit code 1: the loss is not finite at step 1."
    assert read_inventory(tmp_path) == ledger
    # The next call tries it again, and it alone.
    quick_sweep(_file(points), tmp_path)[0].run()
    assert sorted(len(starts) for starts in _starts(tmp_path).values()) == [1, 1, 2]


def test_a_run_that_diverged_is_done_and_never_the_best(tmp_path: Path) -> None:
    points = {"points": [{"learning_rate": 0.9}, {"temperature": 3}]}
    ledger = quick_sweep(_file(points), tmp_path)[0].run()
    first, second = ledger.entries
    assert (first.state, first.objective) == ("finished", None)
    assert first.error == "heldout/kl is not finite: the run diverged"
    assert ledger.ranked() == [second]
    assert read_inventory(tmp_path) == ledger
    search = {"trials": 2, "space": {"learning_rate": [0.9, 0.95]}}
    diverged = quick_sweep(_file({"search": search}), tmp_path / "search")[0].run()
    assert diverged.ranked() == []


def test_the_stop_of_a_sweep_stops_its_runs_in_order(
    tmp_path: Path, begin: Callable[..., Started]
) -> None:
    sweep = begin(GRID, tmp_path, step_s=0.3, parallel=2)
    sweep.wait_for(lambda: len(list(tmp_path.glob("runs/*/state.json"))) == 2)
    sweep.process.send_signal(signal.SIGTERM)
    assert sweep.end() == 143
    assert "its runs have written checkpoints" in sweep.out.read_text()
    assert {entry.state for entry in read_inventory(tmp_path).entries} == {"waiting"}
    assert begin(GRID, tmp_path).end() == 0
    starts = _starts(tmp_path)
    resumed = [steps for steps in starts.values() if len(steps) == 2]
    assert len(resumed) == 2
    assert all(steps[0] == 0 < steps[1] for steps in resumed), "they went on where they stopped"


def test_a_killed_sweep_leaves_no_run_twice(tmp_path: Path, begin: Callable[..., Started]) -> None:
    (tmp_path / "hold").touch()
    first = begin(GRID, tmp_path)
    first.wait_for(lambda: bool(list(tmp_path.glob("runs/*/state.json"))))
    first.process.kill()
    first.end()
    # Its run lives on; the next sweep waits for it instead of training in the same folder.
    second = begin(GRID, tmp_path)
    waits = "an earlier sweep left behind; waiting for it"
    second.wait_for(lambda: waits in second.out.read_text())
    (tmp_path / "hold").unlink()
    assert second.end() == 0
    starts = _starts(tmp_path)
    assert sorted(starts.values()) == [[0]] * 4
    for metrics in tmp_path.glob("runs/*/metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        assert steps == list(range(1, 11))


def test_runs_side_by_side_share_the_threads(tmp_path: Path, begin: Any) -> None:
    assert begin(GRID, tmp_path, parallel=2).end() == 0
    threads = {file.read_text().split()[1] for file in tmp_path.glob("runs/*/starts.log")}
    assert threads == {"2"}
    assert begin(GRID, tmp_path, parallel=2).end() == 0
    assert sorted(_starts(tmp_path).values()) == [[0]] * 4


def test_a_search_finds_the_minimum_and_stops_after_its_trials(tmp_path: Path) -> None:
    ledger = quick_sweep(_file(SEARCH), tmp_path)[0].run()
    assert len(_starts(tmp_path)) == 8
    best = ledger.ranked()[0]
    assert best.objective == min(entry.objective or 9 for entry in ledger.entries)
    assert abs(best.values["loss.temperature"] - 2) < 0.8
    assert [e.state for e in ledger.entries] == ["finished"] * 8
    # The same again asks for nothing and knows what ended; more trials are added to the study.
    again, source = quick_sweep(_file(SEARCH), tmp_path)
    assert tuple(source.ended(tmp_path / "runs")) == ledger.entries
    again.run()
    assert len(_starts(tmp_path)) == 8
    more = {"search": {**SEARCH["search"], "trials": 9}}
    quick_sweep(_file(more), tmp_path)[0].run()
    assert len(_starts(tmp_path)) == 9


@pytest.mark.slow
def test_a_search_that_is_killed_proposes_what_it_would_have(
    tmp_path: Path, begin: Callable[..., Started]
) -> None:
    quick_sweep(_file(SEARCH), tmp_path / "whole")[0].run()
    folder = tmp_path / "killed"
    first = begin(SEARCH, folder, step_s=0.1)
    first.wait_for(lambda: len(list(folder.glob("runs/*/finished.json"))) == 3)
    first.process.kill()
    first.end()
    quick_sweep(_file(SEARCH), folder)[0].run()
    assert set(_starts(folder)) == set(_starts(tmp_path / "whole"))
    assert set(map(tuple, _starts(folder).values())) == {(0,)}


def test_bad_runs_of_a_search_are_given_up(tmp_path: Path) -> None:
    search = {
        "trials": 6, "startup_trials": 1, "pruner": "median", "sampler": "random", "seed": 3,
        "space": {"temperature": {"low": 1, "high": 8}},
    }  # fmt: skip
    os.environ["QUICK_STEP_S"] = "0.1"
    try:
        ledger = quick_sweep(_file({"search": search}), tmp_path)[0].run()
    finally:
        del os.environ["QUICK_STEP_S"]
    states = [entry.state for entry in ledger.entries]
    assert states.count("pruned") >= 1
    assert states.count("finished") + states.count("pruned") == 6
    best = min(abs(e.values["loss.temperature"] - 2) for e in ledger.entries)
    assert abs(ledger.ranked()[0].values["loss.temperature"] - 2) == best
    pruned = next(entry for entry in ledger.entries if entry.state == "pruned")
    assert not (tmp_path / "runs" / pruned.name / "finished.json").exists()


def test_a_failed_trial_is_tried_once_more(tmp_path: Path) -> None:
    search = {"trials": 4, "startup_trials": 1, "space": {"learning_rate": [5.0, 0.5]}}
    first = quick_sweep(_file({"search": search}), tmp_path)[0].run()
    failed = [entry for entry in first.entries if entry.state == "failed"]
    assert len(failed) == 1
    tries = len(_starts(tmp_path)[failed[0].name])
    quick_sweep(_file({"search": search}), tmp_path)[0].run()
    assert len(_starts(tmp_path)[failed[0].name]) > tries
