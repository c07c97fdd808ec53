"""Divergences of the form sum_j f(p_j, q_j): each with its derivatives, value and gradient.

Every divergence here is an f-divergence, f(p, q) = q phi(p / q), so by Euler's theorem
f = p df/dp + q df/dq: one function that returns these two terms gives value and gradient. With
u_j = q_j df/dq_j the gradient on the student's logits (divided by T) is `u_j - q_j sum_k u_k`.

Whether a sum over kept entries and a rest is exact:

- all tokens kept: exact, for each divergence;
- top-k, the rest as one outcome (`bucket`): a lower bound (data processing inequality), biased
  where teacher and student differ within the rest;
- requested entries (the writer's own likeliest tokens; `generate.record_top_k`) are kept ones like
  any other: the terms of reverse KL, JSD and skew on the student's side, weighted by q, are exact
  for them, and only the rest, where the writer had little mass, is one outcome or estimated;
- sampled entries with known p (`sampled_divergence`): unbiased in value and gradient, because f
  is evaluated at exact p and only the SUM over the tail is estimated. Not so for `reverse_kl`,
  whose terms grow without bound as p goes to 0: there sampled entries join the rest.

Shapes: N supervised tokens, K entries of the fullest one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.loss.settings import Divergence
from pipeline.loss.teacher_weights import TeacherWeights

__all__ = ["DivergenceTerms", "FDivergence", "bucket_terms", "gradient_terms"]

_SMALLEST_REST = 2.0**-20
"""Lower bound of the teacher's mass outside the entries in a reverse KL: quantised probabilities
can sum to 1, and any mass of the student there would then cost infinitely much."""


class DivergenceTerms(NamedTuple):
    """A divergence and its gradient on the student's logits divided by T."""

    value_N: Tensor
    """In nats."""
    kept_NK: Tensor
    """a: the gradient at each kept entry; 0 where the entry is not known."""
    tail_N: Tensor
    """c: the gradient of all other tokens together, to be spread as the student's own tail."""


@dataclass(frozen=True, slots=True)
class FDivergence:
    """A divergence and its parameter, `jsd_beta` or `skew_alpha`."""

    name: Divergence
    parameter: float = 0.0

    def halves(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Return (p df/dp, q df/dq) of outcomes; their sum is f. log p may be -inf, not log q."""
        return _HALVES[self.name](log_p, log_q, self.parameter)

    @property
    def absent(self) -> float:
        """phi(0) = f(0, q) / q: the cost of the student's mass where the teacher has none."""
        if self.name == "jensen_shannon":
            return -(1 - self.parameter) * math.log1p(-self.parameter)
        if self.name == "skew_reverse_kl":
            return -math.log(self.parameter)
        return math.inf if self.name == "reverse_kl" else 0.0


def bucket_terms(
    divergence: FDivergence,
    teacher: TeacherWeights,
    log_q_NK: Tensor,
    log_q_tail_N: Tensor,
    known_NK: Tensor,
) -> DivergenceTerms:
    """Return D over the kept entries and one outcome for the rest, given a weight for each.

    Forward KL is linear in the weights, so unbiased weights give an unbiased gradient: `a_i = s q_i
    - w_i`, `c = s q_t - w_t` with s the sum of all weights. The others are not linear.

    Args:
        divergence: D.
        teacher: weights, from `teacher_weights`.
        log_q_NK: the student's log-probabilities of the entries at T.
        log_q_tail_N: the student's log-probability, at T, of all other tokens together.
        known_NK: bool; which entries exist.
    """
    tail_N = teacher.tail_N
    if divergence.name == "reverse_kl":
        tail_N = tail_N.clamp(min=_SMALLEST_REST)
    x_NK, u_NK = divergence.halves(teacher.log_weight_NK, log_q_NK)
    x_NK, u_NK = x_NK.masked_fill_(~known_NK, 0.0), u_NK.masked_fill_(~known_NK, 0.0)
    x_N, u_N = divergence.halves(tail_N.log(), log_q_tail_N)
    value_N = (x_NK + u_NK).sum(-1) + (x_N + u_N)
    return gradient_terms(value_N, u_NK, u_N, log_q_NK, log_q_tail_N)


def gradient_terms(
    value_N: Tensor, u_NK: Tensor, u_tail_N: Tensor, log_q_NK: Tensor, log_q_tail_N: Tensor
) -> DivergenceTerms:
    """Return `a = u_i - q_i U` and `c = u_t - q_t U`, U the sum of all u; u is 0 where unknown."""
    total_N = u_NK.sum(-1) + u_tail_N
    return DivergenceTerms(
        value_N=value_N,
        kept_NK=torch.addcmul(u_NK, log_q_NK.exp(), total_N[:, None], value=-1),
        tail_N=torch.addcmul(u_tail_N, log_q_tail_N.exp(), total_N, value=-1),
    )


_Halves = tuple[Tensor, Tensor]


def _forward_kl(log_p: Tensor, log_q: Tensor, _: float) -> _Halves:
    """KL(p | q) = sum p log(p / q)."""
    p = log_p.exp()
    return (p * (log_p - log_q + 1)).masked_fill_(p == 0, 0.0), -p


def _reverse_kl(log_p: Tensor, log_q: Tensor, _: float) -> _Halves:
    """KL(q | p) = sum q log(q / p)."""
    q = log_q.exp()
    return -q, (q * (log_q - log_p + 1)).masked_fill_(q == 0, 0.0)


def _jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> _Halves:
    """Add beta KL(p | m) and (1 - beta) KL(q | m), m = beta p + (1 - beta) q.

    The generalised form of Agarwal et al. 2024 (GKD); at beta 1/2 the Jensen-Shannon divergence.
    Divided by beta it tends to the forward KL as beta goes to 0, divided by 1 - beta the reverse KL
    as beta goes to 1.
    """
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    x = (p * (log_p - log_m)).masked_fill_(p == 0, 0.0).mul_(beta)
    return x, (q * (log_q - log_m)).masked_fill_(q == 0, 0.0).mul_(1 - beta)


def _skew_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> _Halves:
    """KL(p | m), m = alpha p + (1 - alpha) q (Ko et al. 2024, DistiLLM); at most log(1 / alpha)."""
    p = log_p.exp()
    log_m = torch.logaddexp(log_p + math.log(alpha), log_q + math.log1p(-alpha))
    u = (log_p + log_q - log_m).exp().masked_fill_(p == 0, 0.0).mul_(alpha - 1)
    return (p * (log_p - log_m)).masked_fill_(p == 0, 0.0) - u, u


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> _Halves:
    """KL(q | m), m = (1 - alpha) p + alpha q (DistiLLM too); at most log(1 / alpha)."""
    q = log_q.exp()
    log_m = torch.logaddexp(log_p + math.log1p(-alpha), log_q + math.log(alpha))
    x = (log_p + log_q - log_m).exp().masked_fill_(q == 0, 0.0).mul_(alpha - 1)
    return x, (q * (log_q - log_m)).masked_fill_(q == 0, 0.0) - x


_HALVES: dict[Divergence, Callable[[Tensor, Tensor, float], _Halves]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
}
