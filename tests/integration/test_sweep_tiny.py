"""Sweeps on the tiny cache: refused at once, planned, trained, killed in the middle, reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cache.io.reader import open_cache
from pipeline.evaluate.measures import HeldoutScores
from pipeline.sweeps.ledger import read_inventory
from pipeline.sweeps.process import LOCK_FILE
from tests.conftest import Stage, Tiny
from tests.stage_runner import ENVIRONMENT, ROOT, real_stage


@pytest.fixture(scope="module")
def base(tiny: Tiny, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a sweep file's content without its space, over the tiny run's settings."""
    file = tmp_path_factory.mktemp("base") / "student.yaml"
    flags = iter(tiny.stage_two)
    content = {name.removeprefix("--"): yaml.safe_load(next(flags)) for name in flags}
    content["student.keep_layers"] = [0, 3]
    file.write_text(yaml.safe_dump(content))
    return {"base": str(file), "cache_dir": str(tiny_cache)}


def _write(path: Path, base: dict[str, Any], **space: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**base, **space}, sort_keys=False))
    return path


def _flags(file: Path, *more: str) -> list[str]:
    return ["--sweep", str(file), "--sweep_dir", str(file.parent / "out"), *more]


def test_every_mistake_before_the_first_run(
    base: dict[str, Any], stage: Stage, tmp_path: Path
) -> None:
    file = _write(
        tmp_path / "s.yaml",
        base,
        points=[
            {"temperature": 3.0},
            {"data.max_entries": 17},
            {"loss.tail": "control_variate"},
            {"student_model": str(tmp_path / "nowhere")},
            {"alpha": 2},
            {"loss.temprature": 1},
        ],
    )
    message = stage("sweep", _flags(file)).refused(2)
    for expected in (
        "loss.temperature: found 3; expected one that the cache holds: 1, 2",
        "data.max_entries: found 17; expected at most 16, which is what the cache holds",
        "loss.tail: found control_variate with a top-k cache",
        "nowhere",
        "points, number 5: loss.alpha: found 2, expected less than or equal to 1",
        "points, number 6: loss.temprature: unknown field; did you mean loss.temperature?",
    ):
        assert expected in message, message
    assert message.startswith("6 mistakes in the configuration:")
    assert not (tmp_path / "out").exists()


def test_a_search_is_checked_at_its_corners(
    base: dict[str, Any], stage: Stage, tmp_path: Path
) -> None:
    search = {"space": {"temperature": {"low": 1, "high": 3}, "alpha": [0.5, 1.0]}, "trials": 2}
    message = stage("sweep", _flags(_write(tmp_path / "s.yaml", base, search=search))).refused(2)
    assert "temperature 3, alpha 0.5: loss.temperature: found 3; expected one that" in message


def test_a_point_that_freezes_everything_is_refused_before_any_run(
    base: dict[str, Any], stage: Stage, tmp_path: Path
) -> None:
    points = [{"seed": 42}, {"student.freeze": ["."]}]
    message = stage("sweep", _flags(_write(tmp_path / "s.yaml", base, points=points))).refused(2)
    assert "student.freeze" in message
    assert not (tmp_path / "out").exists()


def test_two_points_that_are_the_same_run(
    base: dict[str, Any], stage: Stage, tmp_path: Path
) -> None:
    file = _write(
        tmp_path / "s.yaml", base, points=[{"seed": 1}, {"seed": 1, "train.save_steps": 5}]
    )
    message = stage("sweep", _flags(file)).refused(2)
    assert "these are the same run; expected points that differ in what is trained" in message


def test_no_cache_and_nothing_to_make_it_with(
    base: dict[str, Any], stage: Stage, tmp_path: Path
) -> None:
    empty = {**base, "cache_dir": str(tmp_path / "none")}
    file = _write(tmp_path / "s.yaml", empty, grid={"temperature": [1, 9], "alpha": [7]})
    assert "loss.alpha: found 7" in stage("sweep", _flags(file)).refused(2)
    file = _write(tmp_path / "s.yaml", empty, grid={"temperature": [1, 9]})
    assert str(tmp_path / "none") in stage("sweep", _flags(file)).refused(3)
    # With a teacher at hand, what its cache will not hold is refused before it is run.
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text("capture:\n  temperatures: [1.0, 2.0]\n")
    file = _write(
        tmp_path / "s.yaml", {**empty, "teacher_config": str(teacher)}, grid={"temperature": [1, 9]}
    )
    message = stage("sweep", _flags(file)).refused(2)
    assert "temperature 9: loss.temperature: found 9; expected one that the cache holds" in message


def test_the_dry_run_counts_and_trains_nothing(
    base: dict[str, Any], stage: Stage, tmp_path: Path, tiny_cache: Path
) -> None:
    file = _write(
        tmp_path / "s.yaml",
        {**base, "overrides": {"num_train_epochs": 2, "max_steps": None}},
        grid={"temperature": [1, 2], "seed": [0, 1]},
    )
    out = stage("sweep", _flags(file, "--dry-run")).ok().out
    source = open_cache(str(tiny_cache)).source("train")
    sequences, tokens = sum(source.shard_rows()), int(source.lengths().sum())
    assert f"{2 * tokens:,}" in out
    assert "temperature 2, seed 1" in out
    assert (
        f"to be run 4 of 4: {out.split('4 of 4: ')[1].split(' steps')[0]} steps, "
        f"{8 * tokens:,} tokens; teacher forward passes avoided, one a sequence: {8 * sequences:,}"
        in out
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sweep_killed_in_the_middle_ends_as_one_that_was_not(
    base: dict[str, Any], tiny_run: Path, tmp_path: Path
) -> None:
    file = _write(
        tmp_path / "s.yaml",
        base,
        points=[{"seed": 42}, {"seed": 43}, {"temperature": 2}],
    )
    out = tmp_path / "out"
    sweep = subprocess.Popen(
        [sys.executable, "-m", "stages.sweep", *_flags(file)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # Both the sweep and its run die, as on a node that goes down.
    mark = "runs/*/checkpoints/step-00000004/complete.json"
    deadline = time.monotonic() + 400
    while not list(out.glob(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    (begun,) = out.glob(mark)
    lock = begun.parents[2] / LOCK_FILE
    sweep.kill()
    os.killpg(json.loads(lock.read_text())["pid"], signal.SIGKILL)
    sweep.wait()
    assert not list(out.glob("runs/*/finished.json"))
    real_stage("sweep", _flags(file), timeout=600).ok()
    ledger = read_inventory(out)
    assert [e.state for e in ledger.entries] == ["finished"] * 3
    # The first point is the run that nobody disturbed, to the last bit.
    first = out / "runs" / ledger.entries[0].name / "heldout-after.json"
    assert first.read_bytes() == (tiny_run / "heldout-after.json").read_bytes()
    report = json.loads((out / "report/report.json").read_text())
    for point in report["sweep"]["points"]:
        if point["rank"]:
            scores = HeldoutScores.read(str(Path(point["folder"]) / "heldout-after.json"))
            assert point["objective"]["value"] == pytest.approx(scores.mean("kl").value)
    times = {f: f.stat().st_mtime_ns for f in out.rglob("*.safetensors")}
    again = real_stage("sweep", _flags(file), timeout=600)
    assert again.out.count("was finished before") == 3
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*.safetensors")} == times


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_search_gives_up_bad_runs_by_their_held_out_kl(
    base: dict[str, Any], tmp_path: Path
) -> None:
    search = {
        "trials": 4, "startup_trials": 1, "sampler": "random", "seed": 1, "pruner": "median",
        "space": {"learning_rate": {"low": "1e-6", "high": "1e-2", "log": True}},
    }  # fmt: skip
    content = {**base, "overrides": {"train.eval_steps": 2}}
    file = _write(tmp_path / "s.yaml", content, search=search)
    real_stage("sweep", _flags(file, "--parallel", "2"), timeout=600).ok()
    ledger = read_inventory(tmp_path / "out")
    assert len(ledger.entries) == 4
    assert {entry.state for entry in ledger.entries} <= {"finished", "pruned"}
    finished = [entry for entry in ledger.entries if entry.state == "finished"]
    assert ledger.ranked()[0].objective == min(entry.objective or 9 for entry in finished)
    for entry in ledger.entries:
        mark = tmp_path / "out/runs" / entry.name / "finished.json"
        # One that is given up may reach its end before it hears of it.
        assert mark.exists() or entry.state == "pruned"
    # The journal holds what a later call goes on from.
    real_stage("sweep", _flags(file), timeout=600).ok()
    assert len(read_inventory(tmp_path / "out").entries) == 4
    assert (tmp_path / "out/report/report.html").exists()
