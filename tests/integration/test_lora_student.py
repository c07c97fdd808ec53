"""A LoRA student: the same under every ZeRO stage and number of ranks, resumed, merged, served."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.observe.metrics import read_metrics
from tests.conftest import Stage, Tiny
from tests.ranks import run_ranks
from tests.stage_runner import Running

STEPS, SAVED = 6, 3
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def flags(tiny: Tiny, tiny_cache: Path) -> list[Any]:
    return [
        *tiny.stage_two, "--cache_dir", tiny_cache, "--max_steps", STEPS, "--save_steps", SAVED,
        "--train.evaluate_before", "false", "--train.timeout_s", "90", "--student.lora.rank", "4",
        "--learning_rate", "2e-2", "--student.lora.save_adapter", "true",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one_process(flags: list[Any], stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "student"
    more = ("--gradient_accumulation_steps", 2, "--output_dir", folder)
    result = stage("train_student", [*flags, *more]).ok()
    assert "LoRA of rank 4 on 14 layers: " in result.err
    return folder


def _losses(folder: Path) -> dict[tuple[int, str], float]:
    return {
        (record.step, name): record.values[name]
        for record in read_metrics(folder / "metrics.jsonl")
        for name in ("train/loss", "heldout/kl")
        if name in record.values
    }


def test_it_learns_and_exports_plain_weights_and_the_adapter(one_process: Path) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    losses = _losses(one_process)
    assert losses[STEPS, "train/loss"] < 0.95 * losses[1, "train/loss"]
    before, after = (load_file(one_process / f"{n}/model.safetensors") for n in ("init", "model"))
    assert before.keys() == after.keys(), "no adapters, and the tied head is stored once"
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj." in name}
    ids = torch.arange(40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(one_process / "model").eval()(ids).logits
        base = AutoModelForCausalLM.from_pretrained(one_process / "init", dtype=torch.float32)
        adapted = PeftModel.from_pretrained(base, one_process / "adapter").eval()(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_ranks_then_one(
    zero: int,
    flags: list[Any],
    one_process: Path,
    start: Callable[..., Running],
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file
    from torch import testing

    folder = tmp_path / "student"
    more = [*flags, "--train.zero_stage", zero, "--output_dir", folder]
    for rank in run_ranks(start, 2, more):
        rank.ok()

    def same() -> None:
        assert _losses(folder) == pytest.approx(_losses(one_process), rel=1e-5)
        # Half of an adapter starts with a gradient of nearly nothing, whose sign Adam follows.
        for part, atol in (("model/model.safetensors", 1e-5), (ADAPTER, 2e-3)):
            a, b = (load_file(path / part) for path in (folder, one_process))
            assert a.keys() == b.keys()
            for name, weight in a.items():
                testing.assert_close(weight, b[name], rtol=1e-4, atol=atol, msg=name)

    same()
    (folder / "finished.json").unlink()
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / f"checkpoints/step-{STEPS:08d}")
    (one,) = run_ranks(start, 1, [*more, "--gradient_accumulation_steps", 2])
    assert f"resuming after step {SAVED} of {STEPS}" in one.ok().err
    same()


def test_bad_targets_are_one_message_before_anything(
    flags: list[Any], stage: Stage, tmp_path: Path
) -> None:
    more = ("--student.lora.target_modules", "q_porj,lm_head", "--output_dir", tmp_path / "out")
    message = stage("train_student", [*flags, *more]).refused(2)
    assert message.startswith("2 mistakes in the configuration:\n")
    assert "found q_porj, which the student does not have; the nearest are q_proj" in message
    assert "found lm_head, which is no linear layer inside the student's body" in message
    assert not (tmp_path / "out").exists()
    both = ("--student.freeze", "embed", "--output_dir", tmp_path / "out")
    assert "with LoRA only the adapters are trained" in stage(
        "train_student", [*flags, *both]
    ).refused(2)
