"""The teacher's weights for the kept entries and for the rest, by tail policy.

Shapes: N supervised tokens, K entries of the fullest one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.loss.settings import TailPolicy
from pipeline.loss.targets import HeadTargets

__all__ = ["TeacherWeights", "known_entries", "teacher_weights"]


class TeacherWeights(NamedTuple):
    """The teacher's side of a divergence: K weights and one for everything else."""

    log_weight_NK: Tensor
    """-inf at padding and at ids outside the student's vocabulary."""
    tail_N: Tensor
    """Weight, not its logarithm, of all tokens that are not kept, as one outcome."""


def known_entries(targets: HeadTargets, *, tail: TailPolicy, vocab_size: int) -> Tensor:
    """Return bool [N, K]: entries that have a logit of the student and a weight.

    Under `bucket` a sampled entry has no weight: it is part of the rest, and a weight of its own
    would be biased.
    """
    known_NK = torch.isfinite(targets.logprobs_NK) & (targets.ids_NK < vocab_size)
    if tail == "bucket" and targets.inclusion_NK is not None:
        known_NK &= targets.inclusion_NK >= 1
    return known_NK


def teacher_weights(
    targets: HeadTargets,
    known_NK: Tensor,
    *,
    temperature: float,
    tail: TailPolicy,
    vocab_size: int,
    dtype: torch.dtype,
) -> TeacherWeights:
    """Compute `w_i = p_i^(1/T) / Z_T / inclusion_i` and the weight of the missing mass.

    - `bucket`: the rest, 1 - sum(w), is one outcome. Quantised values can sum to more than
      1; they are then scaled to 1. Where the kept entries are the student's whole
      vocabulary there is no other outcome, and the weights are scaled to 1 as well.
    - `zero`: the rest is dropped and the weights stay as they are.
    - `renormalise`: the weights are scaled to 1.

    Args:
        targets: as cached.
        known_NK: from `known_entries`.
        temperature: T, the one `targets.log_z_N` belongs to.
        tail: the policy.
        vocab_size: tokens that the student has a logit for.
        dtype: of the result; float32 or float64.
    """
    log_w_NK = targets.logprobs_NK.to(dtype) / temperature - targets.log_z_N.to(dtype)[:, None]
    if targets.inclusion_NK is not None:
        log_w_NK = log_w_NK - targets.inclusion_NK.to(dtype).log()
    log_w_NK = log_w_NK.masked_fill_(~known_NK, -torch.inf)
    sum_N = log_w_NK.exp().sum(-1)
    if tail == "zero":
        return TeacherWeights(log_w_NK, torch.zeros_like(sum_N))
    scaled_N = torch.ones_like(sum_N, dtype=torch.bool)
    if tail == "bucket":
        scaled_N = (sum_N > 1.0) | (known_NK.sum(-1) >= vocab_size)
    factor_N = torch.where(scaled_N & (sum_N > 0), sum_N.reciprocal(), 1.0)
    tail_N = torch.where(scaled_N, 0.0, 1.0 - sum_N)
    return TeacherWeights(log_w_NK + factor_N.log()[:, None], tail_N)
