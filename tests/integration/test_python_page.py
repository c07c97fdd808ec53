"""The page of the Python interface, run from its first block to its last as a notebook would be."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import Tiny
from tests.stage_runner import ROOT, run_python

PAGE = ROOT / "pipeline/api/README.md"


def _blocks() -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tiny: Tiny, tiny_cache: Path, tiny_run: Path, tmp_path: Path) -> Path:
    """Return a folder that holds what the page names, and settings that keep the stages tiny."""
    shutil.copytree(tiny_cache, tmp_path / "runs/default/cache")
    shutil.copytree(tiny_run / "model", tmp_path / "student")
    shutil.copytree(tiny.teacher, tmp_path / "teacher")
    shutil.copy(tiny.corpus, tmp_path / "chats.jsonl")
    return tmp_path


def _run(folder: Path, blocks: list[str]) -> str:
    script = folder / "page.py"
    script.write_text("\n\n".join(blocks), encoding="utf-8")
    done = run_python([script], cwd=folder, env={"PYTHONPATH": str(ROOT)}, timeout=280)
    return done.ok().out


def test_cache_batches_and_loss(folder: Path) -> None:
    checks = """
assert len(token_ids) == len(logprobs) == 16
assert batch["targets"].entries.logprobs_NK.shape == (len(batch["targets"]), 16)
assert loss.isfinite()
"""
    _run(folder, [*_blocks()[:3], checks])


def test_other_trainers(folder: Path) -> None:
    """Both trainers end, and their loss is the trainer's of this project on the same batches."""
    blocks = _blocks()
    checks = """
assert trainer.state.global_step == 4
assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)
"""
    assert sum(len(block.splitlines()) for block in blocks[3:4]) <= 45
    _run(folder, ["import torch", blocks[1], *blocks[2:5], checks])


@pytest.mark.slow
def test_the_stages_as_functions(folder: Path) -> None:
    (folder / "my").mkdir()
    out = _run(folder, _blocks()[5:])
    assert (folder / "my/student/model/config.json").exists()
    assert (folder / "my/sweep/report/report.html").exists()
    assert "MeanError(value=" in out
    assert os.fspath(Path("my/sweep/runs")) in out
