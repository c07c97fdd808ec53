"""Weights of tokens: 1 on average over a step, however it is divided, from what the cache knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.api.settings import StudentRun
from pipeline.cache.codec.targets import CachedSequence, SparseTargets
from pipeline.config import parse_command
from pipeline.data.collate import Batch, collate
from pipeline.errors import ConfigError
from pipeline.loss.settings import LossSettings
from pipeline.loss.tokens.weights import cached_score, threshold_of
from pipeline.student.training.token_weights import StepWeights

SCORES = ("teacher_entropy", "gold_surprise")


def row(seed: int, tokens: int = 9) -> CachedSequence:
    """Return a row with a top-1 target at each position but the first; grid 2, 1."""
    rng = np.random.default_rng(seed)
    n = tokens - 1
    targets = SparseTargets(
        counts_N=np.ones(n, np.int32),
        token_ids_E=np.zeros(n, np.int32),
        logprobs_E=np.full(n, -1.0, np.float32),
        inclusion_E=None,
        temperatures=(2.0, 1.0),
        log_z_NG=np.zeros((n, 2), np.float32),
        entropy_NG=rng.normal(1.0, 1.0, (n, 2)).astype(np.float32),
        label_logprob_N=-rng.exponential(2.0, n).astype(np.float32),
    )
    mask = np.arange(tokens) > 0
    return CachedSequence(f"{seed:032x}", np.arange(tokens, dtype=np.int32), mask, targets)


class Ranks:
    """An engine of one of several ranks, all in this process: what they sum is known beforehand."""

    def __init__(self, total: Tensor | None, scores: Sequence[Any]) -> None:
        self.total, self.scores, self.asked = total, scores, 0

    def total_over_ranks(self, values: Tensor) -> Tensor:
        """Remember this rank's part, give the sum of all."""
        self.mine = values.clone()
        return values if self.total is None else self.total

    def gather_objects(self, mine: Any) -> list[Any]:
        """Give all ranks' scores."""
        self.own = mine
        return list(self.scores) or [mine]

    def evaluate(self, inputs: dict[str, Any]) -> Any:
        """Give a student that is sure of nothing: a cross-entropy of the token's own number."""
        self.asked += 1

        class Terms:
            ce_N = inputs["label_N"].float() / 3

        return None, Terms


def batches(kind: str) -> list[Batch]:
    score = partial(cached_score, kind) if kind in SCORES else None  # type: ignore[arg-type]
    rows = [[row(0), row(1, 4)], [row(2)], []]
    return [collate(part, temperature=2.0, score=score) for part in rows]


def weights_of(kind: str, settings: LossSettings, division: Sequence[Sequence[int]]) -> Tensor:
    """Return all weights of a step whose micro-batches are divided among ranks."""
    every = batches(kind)
    first = [StepWeights(Ranks(None, ()), settings) for _ in division]  # type: ignore[arg-type]
    for weights, mine in zip(first, division, strict=True):
        weights.of_step([every[i] for i in mine])
    engines: Any = [weights._engine for weights in first]
    scores = [engine.own for engine in engines] if settings.weight_quantile else []
    parts = [StepWeights(Ranks(None, scores), settings) for _ in division]  # type: ignore[arg-type]
    for weights, mine in zip(parts, division, strict=True):
        weights.of_step([every[i] for i in mine])
    engines = [weights._engine for weights in parts]
    total = torch.stack([engine.mine for engine in engines]).sum(0)
    found: dict[int, Tensor] = {}
    for mine in division:
        weights = StepWeights(Ranks(total, scores), settings)  # type: ignore[arg-type]
        for i, weight_N in zip(mine, weights.of_step([every[i] for i in mine]), strict=True):
            assert weight_N is not None
            found[i] = weight_N
    return torch.cat([found[i] for i in sorted(found)])


@pytest.mark.parametrize("kind", [*SCORES, "student_disagreement"])
@pytest.mark.parametrize(
    "how", [{}, {"weight_temperature": 2.0}, {"weight_quantile": 0.3}], ids=["1", "2", "quantile"]
)
def test_the_mean_is_1_however_the_step_is_divided(kind: str, how: dict[str, float]) -> None:
    settings = LossSettings(weight=kind, **how)  # type: ignore[arg-type]
    one = weights_of(kind, settings, [[0, 1, 2]])
    for division in ([[0], [1, 2]], [[0, 1], [2]], [[2], [1], [0]]):
        torch.testing.assert_close(weights_of(kind, settings, division), one)
    assert float(one.mean()) == pytest.approx(1, rel=1e-6)
    entropy_N, label_N = (
        np.concatenate([getattr(row(i, n).targets, name) for i, n in ((0, 9), (1, 4), (2, 9))])
        for name in ("entropy_NG", "label_logprob_N")
    )
    ids_N = np.concatenate([np.arange(1, 9), np.arange(1, 4), np.arange(1, 9)])
    score_N = {
        "teacher_entropy": np.maximum(entropy_N[:, 1], 0),  # at temperature 1, not the loss's
        "gold_surprise": -label_N,
        "student_disagreement": np.abs(label_N + ids_N / 3),
    }[kind]
    if "weight_quantile" in how:
        assert int((one > 0).sum()) == round(0.3 * len(one)) == int((one == one.max()).sum())
        assert score_N[one.numpy() > 0].min() >= score_N[one.numpy() == 0].max()
    else:
        raw_N = score_N ** (1 / settings.weight_temperature)
        np.testing.assert_allclose(one.numpy(), raw_N / raw_N.mean(), rtol=1e-5)


def test_what_is_reported_is_the_share_and_the_effective_number() -> None:
    settings = LossSettings(weight="gold_surprise", weight_quantile=0.5)
    weights = StepWeights(Ranks(None, ()), settings)  # type: ignore[arg-type]
    weights.of_step(batches("gold_surprise"))
    said = weights.report()
    assert said["train/weighted_tokens"] == pytest.approx(10 / 19)
    assert said["train/effective_tokens"] == pytest.approx(10 / 19)
    uniform = StepWeights(Ranks(None, ()), LossSettings())  # type: ignore[arg-type]
    assert uniform.of_step(batches("uniform")) == [None, None, None]
    assert uniform.report() == {}


def test_several_teachers_of_a_position_share_its_weight() -> None:
    batch = batches("gold_surprise")[0]
    share_N = torch.rand(batch.num_loss_tokens)
    weights = StepWeights(Ranks(None, ()), LossSettings(weight="gold_surprise"))  # type: ignore[arg-type]
    (found,) = weights.of_step([replace(batch, share_N=share_N)])
    assert found is not None
    assert float(found.sum()) == pytest.approx(float(share_N.sum()), rel=1e-5)


def test_the_highest_scores_are_at_least_one() -> None:
    scores = [np.array([3, 1, 2], np.float32), np.array([2], np.float32)]
    assert threshold_of(scores, 0.01) == 3
    assert threshold_of(scores, 0.5) == 2
    assert threshold_of(scores, 1.0) == 1
    assert threshold_of([], 0.5) == 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--loss.weight_quantile", "0.2"],
            "loss.weight_quantile: found 0.2 with loss.weight uniform",
        ),
        (
            ["--loss.weight", "gold_surprise", "--loss.weight_quantile", "0.2",
             "--loss.weight_temperature", "2"],
            "loss.weight_temperature: found 2 with loss.weight_quantile",
        ),
        (
            ["--loss.weight", "gold_surprise", "--loss.cross_tokenizer", "uld",
             "--temperature", "1"],
            "loss.weight: found gold_surprise with loss.cross_tokenizer uld",
        ),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(flags: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_command(StudentRun, flags, prog="", description="")
