"""Checkpoints: the newest complete one of this run, and no other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ResumeError
from pipeline.student.training.checkpoint import Checkpoints, RunIdentity

IDENTITY: dict[str, Any] = {"train": {"learning_rate": 1e-3, "seed": 1}, "cache": "abc"}


def _checkpoints(folder: Path, keep: int = 2, **changes: Any) -> Checkpoints:
    return Checkpoints(folder, RunIdentity({**IDENTITY, **changes}), keep=keep)


def _save(found: Checkpoints, step: int, *, complete: bool = True) -> Path:
    folder = found.folder(step)
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"x" * step)
    if complete:
        found.mark_complete(step, world_size=2)
    return folder


def test_nothing_there(tmp_path: Path) -> None:
    assert _checkpoints(tmp_path / "new").newest() is None


def test_the_newest_complete_one_wins(tmp_path: Path) -> None:
    found = _checkpoints(tmp_path, keep=9)
    for step in (5, 100, 20):
        _save(found, step)
    _save(found, 200, complete=False)
    newest = _checkpoints(tmp_path).newest()
    assert newest is not None
    assert (newest.step, newest.world_size) == (100, 2)
    assert newest.folder == found.folder(100)
    (found.folder(100) / "complete.json").unlink()
    again = found.newest()
    assert again is not None
    assert again.step == 20


def test_keep_and_tidy(tmp_path: Path) -> None:
    found = _checkpoints(tmp_path, keep=2)
    _save(found, 1)
    _save(found, 2, complete=False)
    assert sorted(path.name for path in found.root.iterdir()) == ["step-00000001", "step-00000002"]
    _save(found, 3)
    assert sorted(path.name for path in found.root.iterdir()) == ["step-00000001", "step-00000003"]
    _save(found, 4)
    assert sorted(path.name for path in found.root.iterdir()) == ["step-00000003", "step-00000004"]
    assert (found.folder(4) / "weights.bin").read_bytes() == b"xxxx"
    found.clear()
    assert list(found.root.iterdir()) == []


def test_another_run_is_refused_with_the_field(tmp_path: Path) -> None:
    _save(_checkpoints(tmp_path), 10)
    other = _checkpoints(tmp_path, train={"learning_rate": 2e-3, "seed": 1})
    with pytest.raises(ResumeError) as caught:
        other.newest()
    said = str(caught.value)
    assert "train.learning_rate: 0.001 there, 0.002 asked for" in said
    assert "seed" not in said
    assert "cache" not in said.split(")")[0]
    assert "--resume_from_checkpoint never" in said
    assert _checkpoints(tmp_path).newest() is not None


@pytest.mark.parametrize(
    ("ranks", "advice"), [(4, "to be 3"), (5, "start with a number of processes that divides 12")]
)
def test_another_size_of_the_step_says_how_to_divide_it(
    ranks: int, advice: str, tmp_path: Path
) -> None:
    train = {"learning_rate": 1e-3, "packs_per_step": 12}
    _save(_checkpoints(tmp_path, train=train), 10)
    train["packs_per_step"] = 2 * ranks
    identity = RunIdentity({**IDENTITY, "train": train})
    with pytest.raises(ResumeError) as caught:
        Checkpoints(tmp_path, identity, keep=2, world_size=ranks).newest()
    said = str(caught.value)
    assert "with 2 processes, had 12 packs" in said
    assert f"with {ranks} processes, has {2 * ranks}" in said
    assert advice in said
    with pytest.raises(ResumeError, match="a checkpoint of another run"):
        _checkpoints(tmp_path, train={**train, "learning_rate": 2e-3}).newest()


def test_a_named_checkpoint(tmp_path: Path) -> None:
    found = _checkpoints(tmp_path)
    folder = _save(found, 10)
    _save(found, 20)
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert found.read(copy).step == 10
    incomplete = _save(found, 30, complete=False)
    (copy / "complete.json").write_text("{")
    for wrong in (incomplete, tmp_path / "gone", copy):
        with pytest.raises(ResumeError, match="no complete checkpoint there"):
            found.read(wrong)


def test_killed_while_deleting_is_incomplete(tmp_path: Path, monkeypatch: Any) -> None:
    found = _checkpoints(tmp_path, keep=1)
    first = _save(found, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *_a, **_k: None)  # as if killed before it
    _save(found, 2)
    assert first.exists()
    assert not (first / "complete.json").exists()
    newest = found.newest()
    assert newest is not None
    assert newest.step == 2


def test_identity_digest_is_of_content() -> None:
    one = RunIdentity({"a": 1, "b": {"c": 2}})
    assert one.digest == RunIdentity({"b": {"c": 2}, "a": 1}).digest
    assert one.digest != RunIdentity({"a": 1, "b": {"c": 3}}).digest
