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


FIRST_LOSS = """
def first_loss(kind, arguments, rows, **options):
    fresh = AutoModelForCausalLM.from_pretrained("student")
    batches = [batch for _, batch in zip(range(2), TargetDataset("runs/default/cache"))]
    total = 0.0
    for batch in batches:
        output = fresh.base_model(**batch["inputs"])
        hidden = output.last_hidden_state
        total += sparse_kl(hidden, fresh, batch["targets"], alpha=0.5, reduction="sum").item()
    wanted = total / sum(len(batch["targets"]) for batch in batches)
    trainer = kind(fresh, arguments, train_dataset=rows, **options)
    trainer.train()
    found = trainer.state.log_history[0]["loss"]
    assert abs(found - wanted) < 1e-3 * wanted, (kind, found, wanted)


once = {"max_steps": 1, "gradient_accumulation_steps": 2, "logging_steps": 1}
rows = TargetDataset("runs/default/cache")
first_loss(CacheTrainer, TrainingArguments("a", **once), rows)
first_loss(
    CacheSFTTrainer,
    SFTConfig("b", bf16=False, dataset_kwargs={"skip_prepare_dataset": True}, **once),
    datasets.IterableDataset.from_generator(lambda: iter(TargetDataset("runs/default/cache"))),
    processing_class=AutoTokenizer.from_pretrained("student"),
)
"""


@pytest.mark.slow
def test_other_trainers(folder: Path) -> None:
    """Both trainers end, and their first loss is `sparse_kl` of the same batches."""
    blocks = _blocks()
    ended = "\nassert trainer.state.global_step == 4\n"
    imports = "import torch\nfrom pipeline import sparse_kl"
    assert len(blocks[3].splitlines()) <= 32
    _run(folder, [imports, *blocks[1:4], ended, blocks[4], ended, FIRST_LOSS])


@pytest.mark.slow
def test_the_stages_as_functions(folder: Path) -> None:
    (folder / "my").mkdir()
    out = _run(folder, _blocks()[5:])
    assert (folder / "my/student/model/config.json").exists()
    assert (folder / "my/sweep/report/report.html").exists()
    assert "MeanError(value=" in out
    assert os.fspath(Path("my/sweep/runs")) in out
