"""A step is passed over only where nothing about it has changed since it was done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stages.steps import Step, Steps


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that runs two steps where they are not done, and names those it ran."""

    def run(option: str = "a") -> list[str]:
        ran = []
        steps = Steps(tmp_path / "run")
        for name in ("cache", "student"):
            output = tmp_path / "run" / name
            step = Step(name, [name, option], output, str(tmp_path / f"{name}.yaml"))
            if not steps.is_done(step):
                _write(output / "weights", name)
                ran.append(name)
                steps.record(step)
        return ran

    for name in ("cache", "student"):
        _write(tmp_path / f"{name}.yaml", "seed: 1")
    return run


def test_nothing_is_done_twice(run: Callable[..., list[str]]) -> None:
    assert run() == ["cache", "student"]
    assert run() == []


def test_what_changed_is_done_again_with_all_after_it(
    run: Callable[..., list[str]], tmp_path: Path
) -> None:
    run()
    _write(tmp_path / "student.yaml", "seed: 2")
    assert run() == ["student"]
    _write(tmp_path / "cache.yaml", "seed: 2")
    assert run() == ["cache", "student"]
    assert run("b") == ["cache", "student"]
    assert run("b") == []


@pytest.mark.parametrize("damage", ["changed", "removed", "added", "folder"])
def test_files_that_are_not_as_they_were_left(
    run: Callable[..., list[str]], tmp_path: Path, damage: str
) -> None:
    run()
    file = tmp_path / "run/student/weights"
    if damage == "changed":
        file.write_text("other")
    elif damage == "removed":
        file.unlink()
    elif damage == "added":
        _write(tmp_path / "run/student/more", "")
    else:
        file.unlink()
        file.parent.rmdir()
    assert run() == ["student"]
    assert run() == []


def test_a_record_that_cannot_be_read_records_nothing(
    run: Callable[..., list[str]], tmp_path: Path
) -> None:
    run()
    (tmp_path / "run/steps.json").write_text("[]")
    assert run() == ["cache", "student"]


def test_another_program_is_asked_again(
    run: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    monkeypatch.setattr("stages.steps._program", lambda: "another")
    assert run() == ["cache", "student"]
