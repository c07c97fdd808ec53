"""Compiling the loops beside the teacher: what the default run needs, and an end with it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from stages.loops import compiling

_LOOPS = {
    "read_runs", "write_runs", "sort_runs", "assemble", "reduce_rows", "lowest_shared",
    "largest_at_places", "places_of_largest", "values_of_top_k",
}  # fmt: skip


def _compiled(folder: Path) -> set[str]:
    return {file.name.split(".")[1].rsplit("-", 1)[0] for file in folder.rglob("*.nbi")}


def test_a_process_beside_compiles_what_the_default_run_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    end = time.monotonic() + 200
    with compiling():
        while not _compiled(tmp_path) >= _LOOPS:
            assert time.monotonic() < end, _compiled(tmp_path)
            time.sleep(0.2)


def test_it_ends_at_once_where_the_teacher_does() -> None:
    started = time.monotonic()
    with compiling():
        pass
    assert time.monotonic() - started < 5
