"""When a folder holds a finished student: of this run, as a whole, ready to generate."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import StoreError
from pipeline.student.output.export import export_student, is_exported


class _Model:
    """Saves what it is given; its disk may be full in the middle."""

    def __init__(self, *, full: bool = False) -> None:
        self.config = SimpleNamespace(use_cache=False)
        self._full = full

    def save_pretrained(self, folder: Path, *, state_dict: dict[str, Any]) -> None:
        (folder / "config.json").write_text(json.dumps({"use_cache": self.config.use_cache}))
        if self._full:
            raise OSError(28, "No space left on device")
        (folder / "weights").write_text(" ".join(state_dict))


def _export(model: _Model, target: Path) -> None:
    export_student(
        model, {"a": None}, target=target, init_folder=target.parent / "none",
        tokenizer_files={"tokenizer.json": b"{}"}, card="card",
    )  # fmt: skip


def test_it_is_there_as_a_whole_and_generates_with_a_cache(tmp_path: Path) -> None:
    model, target = _Model(), tmp_path / "model"
    _export(model, target)
    assert json.loads((target / "config.json").read_text()) == {"use_cache": True}
    assert model.config.use_cache is False, "training goes on without"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_the_student_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    _export(_Model(), target)
    with pytest.raises(StoreError, match="No space left"):
        _export(_Model(full=True), target)
    assert (target / "weights").read_text() == "a"
    # The new one takes the name at once, never file by file.
    seen: list[set[str]] = []
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        seen.append({file.name for file in self.iterdir()})
        assert not to.exists()
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    _export(_Model(), target)
    assert seen == [{"config.json", "weights", "tokenizer.json", "README.md"}]


def test_only_the_mark_of_this_run_counts(tmp_path: Path) -> None:
    target = tmp_path / "model"
    assert not is_exported(target, "abc")
    _export(_Model(), target)
    assert not is_exported(target, "abc")
    (tmp_path / "finished.json").write_text(json.dumps({"identity_digest": "abc"}))
    assert is_exported(target, "abc")
    assert not is_exported(target, "abd")
    (target / "config.json").unlink()
    assert not is_exported(target, "abc")
