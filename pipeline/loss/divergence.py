"""Divergences on the kept entries plus one outcome for the rest: value and gradient, [N, K] only.

A divergence that depends on the student through `log q` of the kept entries and of the rest
alone has, on the logits at temperature T, the gradient `a_i` at kept entry i and
`c * softmax(tail)_j` at every other token j. This module computes (value, a, c); the [N, V] work
around it is the same for all of them.

Shapes: N counted tokens, K entries of the fullest one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.loss.weights import TeacherWeights

__all__ = ["DivergenceTerms", "forward_kl"]


class DivergenceTerms(NamedTuple):
    """A divergence and its gradient on the student's logits divided by T."""

    value_N: Tensor
    """In nats."""
    kept_NK: Tensor
    """a: the gradient at each kept entry; 0 where the entry is not known."""
    tail_N: Tensor
    """c: the gradient of all other tokens together, to be spread as the student's own tail."""


def forward_kl(
    teacher: TeacherWeights, log_q_NK: Tensor, log_q_tail_N: Tensor, known_NK: Tensor
) -> DivergenceTerms:
    """KL(p || q) = sum_i w_i (log p_i - log q_i) + w_t (log w_t - log q_t).

    Linear in the weights, so weights that are right on average give a gradient that is right on
    average: `a_i = m q_i - w_i`, `c = m q_t - w_t` with m the sum of all weights.

    Args:
        teacher: weights, from `teacher_weights`.
        log_q_NK: the student's log-probabilities of the entries at T.
        log_q_tail_N: the student's log-probability, at T, of all other tokens together.
        known_NK: bool; which entries exist.
    """
    surprise_NK = teacher.weight_NK * (teacher.log_target_NK - log_q_NK)
    kept_N = surprise_NK.masked_fill(teacher.weight_NK == 0, 0.0).sum(-1)
    tail_N = teacher.tail_N * (teacher.tail_N.log() - log_q_tail_N)
    total_N = teacher.total_N
    grad_NK = log_q_NK.exp().mul_(total_N[:, None]).sub_(teacher.weight_NK)
    return DivergenceTerms(
        value_N=kept_N + tail_N.masked_fill(teacher.tail_N == 0, 0.0),
        kept_NK=grad_NK.masked_fill_(~known_NK, 0.0),
        tail_N=torch.addcmul(-teacher.tail_N, total_N, log_q_tail_N.exp()),
    )
