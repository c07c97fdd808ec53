"""Weighted tokens in a run: the same on one process and two, reported; held-out over all tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.observe.metrics import read_metrics
from tests.conftest import Stage, Tiny
from tests.ranks import run_ranks
from tests.stage_runner import Running

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "how",
    [
        ("--loss.weight", "student_disagreement", "--loss.weight_temperature", "2"),
        ("--loss.weight", "gold_surprise", "--loss.weight_quantile", "0.3"),
    ],
)
def test_weights_are_those_of_the_global_step(
    how: tuple[str, ...],
    tiny: Tiny,
    tiny_cache: Path,
    stage: Stage,
    start: Callable[..., Running],
    tmp_path: Path,
) -> None:
    flags = [
        *tiny.stage_two, "--cache_dir", tiny_cache, "--max_steps", "4", "--logging_steps", "1",
        "--gradient_accumulation_steps", "2", *how,
    ]  # fmt: skip
    stage("train_student", [*flags, "--output_dir", tmp_path / "one"]).ok()
    halves = [*flags, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", "1"]
    for result in run_ranks(start, 2, halves):
        result.ok()
    one, two = (list(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        if "train/loss" not in a.values:
            continue
        for name in ("train/loss", "train/kl_bucketed", "train/effective_tokens"):
            assert a.values[name] == pytest.approx(b.values[name], rel=1e-4)
        # The loss is of weighted tokens, its KL beside it of all alike.
        assert a.values["train/loss"] != pytest.approx(a.values["train/kl_bucketed"], rel=1e-3)
        assert 0 < a.values["train/effective_tokens"] <= a.values["train/weighted_tokens"] + 1e-9
    if "0.3" in how:
        # Stored log-probs are quantised: tokens of one code count alike.
        assert 0.28 < one[1].values["train/weighted_tokens"] < 0.5
