"""The initial student of a sweep is made once, and only for runs that begin with the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.api.settings import StudentRun
from pipeline.config import dump_yaml
from pipeline.sweeps.plan import Cost, PlannedRun
from pipeline.sweeps.process import POINT_FILE
from pipeline.sweeps.share import share_initial_student
from pipeline.sweeps.space import Point


def _run(root: Path, name: str, **student: Any) -> PlannedRun:
    folder = root / name
    folder.mkdir()
    settings = StudentRun.model_validate(
        {"student": {"keep_layers": [0, 1], **student}, "output": {"output_dir": str(folder)}}
    )
    (folder / POINT_FILE).write_text(dump_yaml(settings))
    return PlannedRun(name, Point({}, settings), folder, "", settings, Cost(1, 0, 0, 0, 0))


@pytest.fixture
def first(tmp_path: Path) -> PlannedRun:
    run = _run(tmp_path, "a")
    (run.folder / "init").mkdir()
    (run.folder / "init" / "made_from.json").write_text("{}")
    (run.folder / "init" / "model.safetensors").write_bytes(b"weights")
    return run


def test_the_same_beginning_is_linked(first: PlannedRun) -> None:
    other = _run(first.folder.parent, "b", freeze=["embed_tokens"])
    assert share_initial_student(other)
    made, linked = (run.folder / "init" / "model.safetensors" for run in (first, other))
    assert made.samefile(linked)
    assert not list(other.folder.glob("*.partial"))
    assert not share_initial_student(other), "it has one"


def test_another_beginning_is_not(first: PlannedRun) -> None:
    root = first.folder.parent
    for name, student in (
        ("cut", {"keep_layers": [0, 2]}),
        ("repair", {"reconstruct": "least_squares"}),
        ("whole", {"keep_layers": None}),
    ):
        assert not share_initial_student(_run(root, name, **student))
    elsewhere = first.settings.model_copy(update={"cache_dir": "another"})
    assert not share_initial_student(replace(_run(root, "cache"), settings=elsewhere))


def test_half_a_folder_is_not_taken(first: PlannedRun) -> None:
    (first.folder / "init" / "made_from.json").unlink()
    assert not share_initial_student(_run(first.folder.parent, "b"))
