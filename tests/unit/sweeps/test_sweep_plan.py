"""Planned runs: always resumed, and checked against the machine as many at a time as run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.api.settings import StudentRun
from pipeline.errors import ConfigError, ResourceError
from pipeline.sweeps import plan
from pipeline.sweeps.plan import Cost, PlannedRun, Planner, check_resources
from pipeline.sweeps.space import Point

GIB = 1 << 30


def _run(folder: Path, name: str, memory: int) -> PlannedRun:
    settings = StudentRun()
    return PlannedRun(
        name, Point({}, settings), folder / name, "", settings, Cost(1, 0, 0, memory, 0)
    )


@pytest.mark.parametrize("chosen", ["auto", "never", "some/folder"])
def test_a_run_of_a_sweep_always_resumes(chosen: str, tmp_path: Path) -> None:
    """`never` in the base would begin each run again at each call of the sweep."""
    base = StudentRun.model_validate({"train": {"resume_from_checkpoint": chosen}})
    placed = plan._placed(base, tmp_path)
    assert isinstance(placed, StudentRun)
    assert placed.train.resume_from_checkpoint == "auto"
    assert (placed.cache_dir, placed.output.output_dir) == (base.cache_dir, str(tmp_path))


def test_memory_is_that_of_the_runs_that_go_on_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "available_memory_bytes", lambda: 25 * GIB)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    runs = [_run(tmp_path, name, memory * GIB) for name, memory in (("a", 3), ("b", 10), ("c", 14))]
    check_resources(runs, parallel=2, folder=tmp_path)
    with pytest.raises(ResourceError, match=r"3 runs at a time need about 27 GiB"):
        check_resources(runs, parallel=3, folder=tmp_path)


def test_a_finished_run_needs_neither_memory_nor_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "available_memory_bytes", lambda: 5 * GIB)
    monkeypatch.setattr(plan, "free_disk_bytes", lambda _: 7 * GIB)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    small, large = (
        replace(_run(tmp_path, name, memory * GIB), cost=Cost(1, 0, 0, memory * GIB, disk * GIB))
        for name, memory, disk in (("small", 4, 6), ("large", 9, 90))
    )
    with pytest.raises(ResourceError, match="of memory"):
        check_resources([small, large], parallel=1, folder=tmp_path)
    (large.folder / "model").mkdir(parents=True)
    (large.folder / "model/config.json").write_text("{}")
    (large.folder / "finished.json").write_text('{"identity_digest": ""}')
    check_resources([small, large], parallel=2, folder=tmp_path)
    monkeypatch.setattr(plan, "free_disk_bytes", lambda _: 5 * GIB)
    with pytest.raises(ResourceError, match="1 runs need about 6 GiB of disk"):
        check_resources([small, large], parallel=1, folder=tmp_path)


def test_two_points_that_are_one_run_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = Planner("cache", tmp_path, nproc=1)
    monkeypatch.setattr(plan, "open_caches", lambda _url: None)
    monkeypatch.setattr(
        planner, "plan", lambda point: replace(_run(tmp_path, "a", 1), point=point, digest="same")
    )
    points = [Point({"loss.alpha": alpha}, StudentRun()) for alpha in (0.5, 0.6)]
    assert len(planner.plan_all(points[:1])) == 1
    with pytest.raises(ConfigError, match="these are the same run"):
        planner.plan_all(points)
