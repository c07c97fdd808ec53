"""Two processes that share each pass compute what one does: losses, weights, held-out scores."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.observe.metrics import read_metrics
from tests.bench.sequence_parallel import differences, run_processes
from tests.conftest import Tiny
from tests.ranks import run_ranks
from tests.stage_runner import Running

Start = Callable[..., Running]
STEPS, SAVED = 6, 3
NAMES = ("train/loss", "train/grad_norm", "train/tokens", "heldout/kl", "heldout/ece")
MOST = 1e-5


def _values(folder: Path) -> dict[tuple[int, str], float]:
    return {
        (record.step, name): record.values[name]
        for record in read_metrics(folder / "metrics.jsonl")
        for name in NAMES
        if name in record.values
    }


def _run(start: Start, world: int, flags: list[Any], folder: Path, *more: Any) -> str:
    results = run_ranks(start, world, [*flags, "--output_dir", folder, *more])
    return "\n".join(result.ok().err for result in results)


@pytest.mark.slow
def test_two_slices_are_one_pass(
    tiny: Tiny, tiny_cache: Path, start: Start, tmp_path: Path
) -> None:
    """ZeRO 2 and 3; a run that changes between one process and two slices goes on as it was."""
    from safetensors.torch import load_file
    from torch import testing

    flags = [
        *tiny.stage_two, "--cache_dir", tiny_cache, "--max_steps", STEPS, "--save_steps", SAVED,
        "--train.timeout_s", "90", "--gradient_accumulation_steps", "2",
    ]  # fmt: skip
    sliced = ("--train.sequence_parallel_size", "2")
    saving = (
        *sliced, "--train.tiled_mlp", "true", "--train.offload_activations", "true",
        "--student.gradient_checkpointing", "true", "--train.zero_stage", "3",
    )  # fmt: skip
    sliced = (*sliced, "--train.zero_stage", "2")
    _run(start, 1, flags, tmp_path / "one", "--train.zero_stage", "2")
    _run(start, 2, flags, tmp_path / "two", *saving)
    # One process begins, two slices go on from its checkpoint.
    folder = tmp_path / "both"
    shutil.copytree(tmp_path / "one", folder)
    (folder / "finished.json").unlink()
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / f"checkpoints/step-{STEPS:08d}")
    assert f"resuming after step {SAVED} of {STEPS}" in _run(start, 2, flags, folder, *sliced)
    expected = _values(tmp_path / "one")
    weights = load_file(tmp_path / "one/model/model.safetensors")
    for other in (tmp_path / "two", folder):
        assert _values(other) == pytest.approx(expected, rel=MOST), other.name
        for name, weight in load_file(other / "model/model.safetensors").items():
            testing.assert_close(weight, weights[name], rtol=MOST, atol=MOST, msg=name)


@pytest.mark.slow
def test_families_and_one_that_has_no_slices() -> None:
    """Shared heads of keys, sliding windows; short convolutions are found out by the trial."""
    arms = [("mqa", False), ("gemma3", False), ("gpt2", False)]
    one, two = run_processes(1, arms), run_processes(2, [*arms, ("lfm2", False)])
    for arm in arms:
        loss, weights = differences(one[arm], two[arm])
        assert loss < 1e-6, arm
        assert weights < MOST, arm
    assert "slices change the hidden states of Lfm2ForCausalLM by" in two["lfm2", False]
