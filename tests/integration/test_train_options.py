"""What a training may choose beside its defaults: run on a tiny student, or refused in words."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.observe.metrics import read_metrics
from tests.conftest import Stage, Tiny
from tests.ranks import run_ranks
from tests.stage_runner import Running

Start = Callable[..., Running]
STEPS = 6


@pytest.fixture(scope="module")
def flags(tiny: Tiny, tiny_cache: Path) -> list[Any]:
    return [
        *tiny.stage_two, "--cache_dir", tiny_cache, "--max_steps", STEPS, "--save_steps", 3,
        "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2,
        "--train.evaluate_before", "false",
    ]  # fmt: skip


def _losses(folder: Path) -> list[float]:
    records = read_metrics(folder / "metrics.jsonl")
    return [r.values["train/loss"] for r in records if "train/loss" in r.values]


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model/model.safetensors"))


def _forget_the_end(folder: Path) -> None:
    (folder / "finished.json").unlink()
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / f"checkpoints/step-{STEPS:08d}")


@pytest.fixture(scope="module")
def plain(flags: list[Any], stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "student"
    stage("train_student", [*flags, "--output_dir", folder]).ok()
    return folder


def test_weights_in_cpu_memory(flags: list[Any], plain: Path, stage: Stage, tmp_path: Path) -> None:
    more = ("--train.offload_parameters", "true", "--train.offload_optimizer", "true")
    stage("train_student", [*flags, "--output_dir", tmp_path, *more]).ok()
    assert _losses(tmp_path) == pytest.approx(_losses(plain), rel=1e-5)


def test_a_learning_rate_of_its_own(
    flags: list[Any], plain: Path, stage: Stage, tmp_path: Path
) -> None:
    import torch

    rates = ("--train.learning_rates", "{embed_tokens: 0.0}")
    stage("train_student", [*flags, "--output_dir", tmp_path, *rates, "--weight_decay", 0]).ok()
    ours, theirs = _weights(tmp_path), _weights(plain)
    first = _weights_before(plain)
    name = next(name for name in ours if "embed_tokens" in name)
    assert torch.equal(ours[name], first[name])
    assert not torch.equal(theirs[name], first[name])
    other = next(name for name in ours if "q_proj" in name)
    assert not torch.equal(ours[other], first[other])
    message = stage(
        "train_student",
        [*flags, "--output_dir", tmp_path / "b", "--train.learning_rates", "{x9: 1}"],
    ).refused(2)
    assert "train.learning_rates: 'x9' fits no parameter that is trained" in message


def _weights_before(folder: Path) -> dict[str, Any]:
    """Return those of the pruned model."""
    from safetensors.torch import load_file

    return dict(load_file(folder / "init/model.safetensors"))


@pytest.mark.slow  # torch compiles its iteration
@pytest.mark.parametrize("zero", [0, 2])
def test_muon(zero: int, flags: list[Any], plain: Path, stage: Stage, tmp_path: Path) -> None:
    more = ("--optim", "muon", "--train.zero_stage", zero, "--learning_rate", "0.02")
    stage("train_student", [*flags, "--output_dir", tmp_path, *more]).ok()
    losses = _losses(tmp_path)
    assert losses[0] == pytest.approx(_losses(plain)[0], rel=1e-5)
    assert losses[-1] < losses[0]


def test_moments_in_8_bits(flags: list[Any], plain: Path, stage: Stage, tmp_path: Path) -> None:
    run = stage("train_student", [*flags, "--output_dir", tmp_path, "--optim", "adamw_8bit"])
    if importlib.util.find_spec("torchao") is None:
        message = run.refused(2)
        assert "train.optim: found adamw_8bit without a package that has it" in message
        return
    run.ok()
    assert _losses(tmp_path) == pytest.approx(_losses(plain), rel=1e-2)


@pytest.mark.slow
def test_the_average_of_the_weights(
    flags: list[Any], plain: Path, start: Start, tmp_path: Path
) -> None:
    """One process and two, stopped and gone on with by one: the same average; a decay of 0 none."""
    import torch

    def run(folder: Path, ranks: int, *more: Any) -> dict[str, Any]:
        sizes = ("--gradient_accumulation_steps", 2 // ranks, "--train.zero_stage", 2)
        command = [*flags, *sizes, *more, "--output_dir", folder]
        for result in run_ranks(start, ranks, command):
            result.ok()
        return _weights(folder)

    one = run(tmp_path / "one", 1, "--train.ema_decay", "0.9")
    run(tmp_path / "two", 2, "--train.ema_decay", "0.9")
    _forget_the_end(tmp_path / "two")
    two = run(tmp_path / "two", 1, "--train.ema_decay", "0.9")
    almost = run(tmp_path / "none", 1, "--train.ema_decay", "1e-9")
    last, first = _weights(plain), _weights_before(plain)
    assert _losses(tmp_path / "one") == pytest.approx(_losses(plain), rel=1e-5)
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(almost[name], last[name], rtol=1e-4, atol=2e-5)
    moved = {name: float((w - first[name]).norm()) for name, w in last.items()}
    behind = {name: float((one[name] - first[name]).norm()) for name in last}
    name = max(moved, key=lambda name: moved[name])
    assert 0 < behind[name] < 0.5 * moved[name]


@pytest.mark.parametrize("check", [["--check"], []])
def test_a_profile_after_the_end_is_refused_before_the_student_is_made(
    check: list[str], flags: list[Any], stage: Stage, tmp_path: Path
) -> None:
    more = ["--output_dir", tmp_path / "student", "--train.profile_steps", "5:9", *check]
    assert stage("train_student", [*flags, *more]).refused(2) == (
        f"train.profile_steps is 5:9, but the run has {STEPS} steps; expected steps from 1 to "
        f"{STEPS}; choose an earlier window, or train for longer."
    )
    assert not list((tmp_path / "student").glob("*"))


def test_a_folder_for_what_is_offloaded(flags: list[Any], stage: Stage, tmp_path: Path) -> None:
    more = ("--train.offload_optimizer", "true", "--train.offload_folder", tmp_path / "nvme")
    result = stage("train_student", [*flags, "--output_dir", tmp_path / "s", *more, "--check"])
    if result.code != 0:  # a machine without libaio
        assert "asynchronous file access cannot be built here" in result.refused(2)
