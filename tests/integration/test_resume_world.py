"""A run goes on with another number of ranks: the same losses, at every ZeRO stage."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.observe.metrics import read_metrics
from tests.conftest import Tiny
from tests.ranks import run_ranks
from tests.stage_runner import Running

Start = Callable[..., Running]
STEPS, SAVED = 8, 4
NAMES = ("train/loss", "train/grad_norm", "train/learning_rate", "heldout/kl")
BATCH = {1: ("2", "2"), 2: ("2", "1")}
"""Packs of a pass and passes of a step, by number of ranks: four packs a step."""


@pytest.fixture(scope="module")
def flags(tiny: Tiny, tiny_cache: Path) -> list[Any]:
    return [
        *tiny.stage_two, "--cache_dir", tiny_cache, "--max_steps", STEPS, "--save_steps", SAVED,
        "--train.evaluate_before", "false", "--train.timeout_s", "90",
    ]  # fmt: skip


def _run(start: Start, flags: list[Any], world: int, folder: Path, *more: Any) -> str:
    batch, accumulation = BATCH[world]
    sizes = ("--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
    results = run_ranks(start, world, [*flags, *sizes, "--output_dir", folder, *more])
    return "\n".join(result.ok().err for result in results)


def _forget_the_end(folder: Path) -> None:
    (folder / "finished.json").unlink()
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / f"checkpoints/step-{STEPS:08d}")


def _values(folder: Path, names: tuple[str, ...] = NAMES) -> dict[tuple[int, str], float]:
    return {
        (record.step, name): record.values[name]
        for record in read_metrics(folder / "metrics.jsonl")
        for name in names
        if name in record.values
    }


def _same(folder: Path, other: Path, *, rel: float, names: tuple[str, ...] = NAMES) -> None:
    from safetensors.torch import load_file
    from torch import testing

    ours, theirs = _values(folder, names), _values(other, names)
    assert {step for step, _ in ours} == set(range(1, STEPS + 1))
    assert ours == pytest.approx(theirs, rel=rel)
    a, b = (load_file(path / "model/model.safetensors") for path in (folder, other))
    for name, weight in a.items():
        testing.assert_close(weight, b[name], rtol=rel, atol=rel, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_to_two_ranks_and_back(
    zero: int, dtype: str, flags: list[Any], start: Start, tmp_path: Path
) -> None:
    more = ("--train.zero_stage", zero, "--bf16", str(dtype == "bfloat16").lower())
    undisturbed = tmp_path / "one"
    _run(start, flags, 1, undisturbed, *more)
    rel = 1e-5 if dtype == "float32" else 2e-2
    for before, after in ((1, 2), (2, 1)):
        folder = tmp_path / f"{before}-{after}"
        _run(start, flags, before, folder, *more)
        _forget_the_end(folder)
        log = _run(start, flags, after, folder, *more)
        assert f"resuming after step {SAVED} of {STEPS}" in log
        # At stage 0 every rank holds all; bfloat16 has no stage 0.
        assert ("resharded for" in log) == (zero > 0 or dtype == "bfloat16")
        _same(folder, undisturbed, rel=rel)
        assert not list(folder.glob("*.partial"))


@pytest.mark.slow
def test_what_does_not_allow_it_is_said_before_training(
    flags: list[Any], start: Start, tmp_path: Path
) -> None:
    """Another global batch; a disk without room for the copy; a damaged part. Nothing is lost."""
    folder = tmp_path / "student"
    _run(start, flags, 2, folder, "--train.zero_stage", 2)
    _forget_the_end(folder)
    one = [*flags, "--output_dir", folder]
    sizes = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2")
    (other_stage,) = run_ranks(start, 1, [*one, *sizes, "--train.zero_stage", 1])
    assert other_stage.refused(3) == (
        f"{folder}/checkpoints/step-{SAVED:08d}: a checkpoint of ZeRO stage 2, this run has stage "
        "1; expected the same; run the same command with --train.zero_stage 2."
    )
    (two_packs,) = run_ranks(start, 1, one)
    assert two_packs.refused(3) == (
        f"{folder}/checkpoints/step-{SAVED:08d}: a step of that run, with 2 processes, had 4 packs;"
        " one of this run, with 1 process, has 2; expected 4 again; choose "
        "per_device_train_batch_size times gradient_accumulation_steps to be 4."
    )
    one += sizes
    (full,) = run_ranks(start, 1, one, hooks={0: ("little_disk_to_reshard", 1 << 20)})
    message = full.refused(4)
    assert "to go on with another number of processes its" in message
    assert "start the number of processes it was written by" in message
    part = next((folder / f"checkpoints/step-{SAVED:08d}").glob("*_rank_1_*optim_states.pt"))
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    (damaged,) = run_ranks(start, 1, one)
    assert "cannot be resharded for another number of processes" in damaged.refused(3)
    part.write_bytes(whole)
    # Killed while it is resharded: the checkpoint is valid, and the next run starts over.
    kill = ("kill_before", "pipeline.student.training.reshard", "_Conversion.poll")
    (killed,) = run_ranks(start, 1, one, hooks={0: kill})
    assert killed.code == -signal.SIGKILL
    assert list(folder.glob("reshard.*.partial"))
    log = run_ranks(start, 1, one)[0].ok().err
    assert f"resuming after step {SAVED} of {STEPS}" in log


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "rmsprop"])
def test_other_optimisers_at_every_stage(
    optim: str, flags: list[Any], start: Start, tmp_path: Path
) -> None:
    """Two ranks as one, and stopped in between; cut for another number of ranks if it can be."""
    rate = "0.2" if optim == "sgd" else "1e-3"
    more = ("--optim", optim, "--learning_rate", rate, "--train.zero_stage")
    one = tmp_path / "one"
    _run(start, flags, 1, one, *more, 0)
    for zero in (1, 2, 3):
        folder = tmp_path / f"zero{zero}"
        _run(start, flags, 2, folder, *more, zero)
        _forget_the_end(folder)
        assert "resuming after" in _run(start, flags, 2, folder, *more, zero)
        _same(
            folder,
            one,
            rel=1e-4,
            names=("train/loss", "train/learning_rate", "heldout/kl"),
        )
    _forget_the_end(folder)
    batch = ("--gradient_accumulation_steps", "2", "--output_dir", folder)
    (last,) = run_ranks(start, 1, [*flags, *batch, *more, 3])
    if optim == "adamw_torch":
        assert "resharded for" in last.ok().err
    else:
        message = last.refused(3)
        assert f"the state of {optim} under ZeRO cannot be resharded" in message
        assert "start with NPROC=2" in message


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_optimiser_in_cpu_memory(
    zero: int, flags: list[Any], start: Start, tmp_path: Path
) -> None:
    one, folder = tmp_path / "one", tmp_path / "two"
    _run(start, flags, 1, one, "--train.zero_stage", zero)
    more = ("--train.zero_stage", zero, "--train.offload_optimizer", "true")
    _run(start, flags, 2, folder, *more)
    _forget_the_end(folder)
    assert "resuming after" in _run(start, flags, 2, folder, *more)
    _same(folder, one, rel=1e-5)
