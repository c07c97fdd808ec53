"""From cached entries to the teacher's distribution at a temperature, tail policy included.

Shapes: N counted tokens, K entries of the fullest one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.loss.settings import TailPolicy
from pipeline.loss.types import HeadTargets

__all__ = ["TeacherWeights", "known_entries", "teacher_weights"]


class TeacherWeights(NamedTuple):
    """The teacher's side of a divergence: K weights and one for everything else."""

    weight_NK: Tensor
    """0 at padding and at ids outside the student's vocabulary."""
    log_target_NK: Tensor
    """The logarithm set against log q in a value; finite where the weight is not 0."""
    tail_N: Tensor
    """Weight of all tokens that are not kept, as one outcome."""

    @property
    def total_N(self) -> Tensor:
        """All the weight of a token; 1 unless the policy is `zero`."""
        return self.weight_NK.sum(-1) + self.tail_N


def known_entries(targets: HeadTargets, *, vocab_size: int) -> Tensor:
    """Return bool [N, K]: entries that are no padding and that the student has a logit for."""
    return torch.isfinite(targets.logprobs_NK) & (targets.ids_NK < vocab_size)


def teacher_weights(
    targets: HeadTargets,
    known_NK: Tensor,
    *,
    temperature: float,
    tail: TailPolicy,
    vocab_size: int,
    dtype: torch.dtype,
) -> TeacherWeights:
    """Compute `w_i = p_i^(1/T) / Z_T / inclusion_i` and what becomes of the missing mass.

    - `bucket`: the rest, 1 - sum(w), is one outcome. Values from a coarse grid can sum to more
      than 1; they are then scaled to 1. Where the kept entries are the student's whole
      vocabulary there is no other outcome, and the weights are scaled to 1 as well.
    - `zero`: the rest is dropped and the weights stay as they are: for sampled entries their sum
      is 1 only in expectation, and scaling would bias the gradient. The value sets log p_T, not
      log w, against log q, which is unbiased too; without sampling the two are the same.
    - `renormalise`: the weights are scaled to 1.

    Args:
        targets: as cached.
        known_NK: from `known_entries`.
        temperature: T, the one `targets.log_z_N` belongs to.
        tail: the policy.
        vocab_size: tokens that the student has a logit for.
        dtype: of the result; float32 or float64.
    """
    log_p_NK = targets.logprobs_NK.to(dtype) / temperature - targets.log_z_N.to(dtype)[:, None]
    log_w_NK = log_p_NK
    if targets.inclusion_NK is not None:
        log_w_NK = log_p_NK - targets.inclusion_NK.to(dtype).log()
    weight_NK = log_w_NK.exp().masked_fill(~known_NK, 0.0)
    sum_N = weight_NK.sum(-1)
    if tail == "zero":
        return TeacherWeights(weight_NK, log_p_NK, torch.zeros_like(sum_N))
    scaled_N = torch.ones_like(sum_N, dtype=torch.bool)
    if tail == "bucket":
        scaled_N = (sum_N > 1.0) | (known_NK.sum(-1) >= vocab_size)
    factor_N = torch.where(scaled_N & (sum_N > 0), sum_N.reciprocal(), 1.0)
    tail_N = torch.where(scaled_N, 0.0, 1.0 - sum_N)
    return TeacherWeights(weight_NK * factor_N[:, None], log_w_NK + factor_N.log()[:, None], tail_N)
