"""How much each token of a step counts: a weight from a score, 1 on average over the step.

A token's score says where there is something to learn. Of N supervised tokens of a step, on all
ranks and in all micro-batches, token n has

    weight_n = N a_n / sum_m a_m,   a_n = score_n^(1 / temperature),
                                 or a_n = 1 for the highest `quantile` of the scores, else 0.

A power is a softmax of log scores at that temperature: 1 is in proportion to the score, higher ones
are nearer to uniform. No score depends on which entries were sampled: the gradient of the weighted
loss is unbiased where that of the loss is.

Shapes: N targets of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.loss.settings import TokenWeight

__all__ = ["WeightSums", "cached_score", "disagreement", "raw_weights", "threshold_of"]


class WeightSums(NamedTuple):
    """Of raw weights a, over all tokens of a step; each token once, whatever its teachers."""

    total: Tensor
    squares: Tensor
    above_zero: Tensor
    """Tokens of a weight above 0."""
    tokens: Tensor

    @classmethod
    def of(cls, raw_N: Tensor, share_N: Tensor | None) -> Tensor:
        """Return the four sums of a micro-batch, float64 [4]."""
        raw_N = raw_N.double()
        share = torch.ones_like(raw_N) if share_N is None else share_N.double()
        parts = (raw_N, raw_N.square(), (raw_N > 0).double(), torch.ones_like(raw_N))
        return torch.stack([(share * part).sum() for part in parts])

    def scale(self) -> Tensor:
        """Return what raw weights are multiplied by, so that their mean is 1; 0 where all are 0."""
        return torch.where(self.total > 0, self.tokens / self.total, 0.0)

    def report(self) -> dict[str, float]:
        """Return the share of tokens that count at all, and the effective number over all.

        The effective number is (sum a)^2 / sum a^2 (Kish 1965): how many tokens of equal weight
        would have the variance of these.
        """
        total, squares, above_zero, tokens = (float(value) for value in self)
        return {
            "train/weighted_tokens": above_zero / max(tokens, 1.0),
            "train/effective_tokens": total**2 / squares / tokens if squares else 0.0,
        }


def cached_score(
    kind: TokenWeight, entropy_N: NDArray[np.float32], label_logprob_N: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the score of each target from the cache's statistics, in nats, at least 0.

    Args:
        kind: `teacher_entropy` or `gold_surprise`.
        entropy_N: the teacher's, at temperature 1; can be below 0 by its rounding.
        label_logprob_N: log p of the supervised token.
    """
    assert kind in ("teacher_entropy", "gold_surprise"), kind
    score_N = entropy_N if kind == "teacher_entropy" else -label_logprob_N
    return np.maximum(score_N, 0).astype(np.float32)


def disagreement(label_logprob_N: Tensor, ce_N: Tensor) -> Tensor:
    """Return |log p - log q| of the supervised token, in nats: teacher against student."""
    return (label_logprob_N + ce_N).abs()


def raw_weights(score_N: Tensor, *, temperature: float, threshold: float | None) -> Tensor:
    """Return a of each target, float32.

    Args:
        score_N: at least 0.
        temperature: of the power; of no effect with a threshold.
        threshold: the lowest score that counts, see `threshold_of`; None: the power.
    """
    if threshold is not None:
        return (score_N >= threshold).float()
    return score_N.float().pow(1 / temperature)


def threshold_of(scores: Sequence[NDArray[np.float32]], quantile: float) -> float:
    """Return the lowest of the highest scores of a step, so many of all; at least one token.

    Tokens of equal scores count alike, so it can be a few more.

    Args:
        scores: of all ranks and micro-batches.
        quantile: their share of the tokens, above 0 and at most 1.
    """
    every = np.concatenate([np.zeros(0, np.float32), *scores])
    if not len(every):
        return 0.0
    count = min(max(round(quantile * len(every)), 1), len(every))
    return float(np.partition(every, len(every) - count)[len(every) - count])
