"""Unbiased divergence from sampled entries, with the student's own tail as control variate.

The teacher's always-kept entries H are known exactly; of the tail, entry j was sampled with
probability pi_j, by a draw that does not look at the student. Any sum over the tail is then
estimated without bias by sum_S x_j / pi_j over the sampled S (Horvitz and Thompson 1952), and so is

    sum_tail f(p_j, q_j) = E[ C + sum_S (f(p_j, q_j) - c_j) / pi_j ],   C = sum_tail c_j,

for every c whose sum over the tail is known. The nearer c is to f, the less noise. Known are the
tail's masses P and Q, of the teacher and of the student, so c may be any combination of p_j and
q_j; the tangent of f at the ratio P / Q is the natural one, for a teacher whose tail is shaped as
the student's: c = tau p + upsilon q with tau, upsilon the derivatives of f at (P, Q). It is exact
to second order, and with it alone (share 1, no sampled entries) the bucket is left: C = f(P, Q).

Far out, where q >> p, the correction (f - c) / pi is large; there the p = 0 limit, c = phi(0) q,
is better. The mixture `share * tangent + (1 - share) * limit` is unbiased for any share. For
forward KL phi(0) = 0 and upsilon = -P / Q: the target is w_j = p_j on H and elsewhere

    w_j = kappa q_j + [j sampled] (p_j - kappa q_j) / pi_j,   kappa = share * P / Q.

How far to lean on the student is a matter of how near it is: `row_share`. It may depend on
anything but the draw, so what a row's always-kept entries say of the student will do.

The gradient holds tau, upsilon and P, Q within them constant (they are numbers of the estimate, not
of what is estimated), so it is the mean gradient, not the derivative of the single value.

Shapes: N supervised tokens, K entries of the fullest one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.loss.divergence import DivergenceTerms, FDivergence, gradient_terms
from pipeline.loss.types import HeadTargets
from pipeline.sampling.quantisation import rounding_log_bias

__all__ = ["default_share", "dither_bias", "row_share", "sampled_terms"]


def default_share(temperature: float, rule_highest: float = 0.0) -> float:
    """Return 1.14 - 0.8 / T, and 0.12 more below the rule's highest temperature, within 0 and 1.

    The share of a row whose student is the teacher, as far as can be seen. Where q is far above p,
    an entry's correction is share * q / pi, and pi follows p: the lower the temperature the faster,
    so T = 1 wants less; an inclusion rule for T = 2 as well draws such entries more often, so there
    T = 1 bears more.
    """
    below = min(max(rule_highest - temperature, 0.0), 1.0)
    return min(max(0.0, 1.14 - 0.8 / temperature + 0.12 * below), 1.0)


def row_share(
    divergence_N: Tensor, spread_N: Tensor, temperature: float, rule_highest: float = 0.0
) -> Tensor:
    """Return the share of each row: default_share / ((1 + 2 D)^(2 / T) (1 + v / 8)).

    D is small where the always-kept entries have little mass, whatever they say: those rows of a
    far student carry its error. v is their mean, whatever their mass. The best share of a row would
    be 1 / (1 + chi^2), of the two tails, and chi^2 grows with the variance of log p / q, which v
    extrapolates.

    Expected squared error of the weight gradient over that without a control variate, in brackets
    that of a far student, cut to six layers and not yet trained (`make bench-control`, `--cut`;
    summed over every draw there could be): T = 1 of the inclusion rule of T = 1 alone 0.81 (2.7),
    of that of T = 1 and 2 0.68 (2.0); T = 2 0.32 (0.85). By D alone the far student had 4.0, 3.7,
    1.12. A constant share of 0.15, which looks best in four draws, has 1.01 (14,000): one draw of
    eight met a token of q = 5,000 p and had 2.5 times the error.

    Args:
        divergence_N: D, over the always-kept entries and the rest as one outcome, at T.
        spread_N: v, the mean of (log p - log q)^2 over the always-kept entries, weighted by p, at
            T.
        temperature: T.
        rule_highest: highest temperature that the inclusion rule draws for; 0: T itself.
    """
    near_N = (1 + 2 * divergence_N.clamp(min=0.0)) ** (2 / temperature) * (1 + spread_N / 8)
    return default_share(temperature, rule_highest) / near_N


def dither_bias(log_step: float, temperature: float) -> tuple[float, float]:
    """Return log E[e^u] and E[u e^u] / E[e^u] - log E[e^u], u uniform in +-log_step / (2 T).

    That is what rounding with dither does to a sampled entry: log p / T comes with u added, so p_T
    comes out e^first too large on average, and, that taken off, p_T log p_T by p_T times second.
    With a step of 2 nats: 0.161 and 0.152 at T = 1, 0.041 and 0.042 at T = 2.
    """
    half = log_step / (2 * temperature)
    if half == 0:
        return 0.0, 0.0
    log_mean = rounding_log_bias(log_step, temperature)
    return log_mean, half / math.tanh(half) - 1 - log_mean


def sampled_terms(
    divergence: FDivergence,
    targets: HeadTargets,
    log_q_NK: Tensor,
    log_q_tail_N: Tensor,
    known_NK: Tensor,
    *,
    temperature: float,
    share: float | None,
    vocab_size: int,
    log_step: float = 0.0,
    rule_highest: float = 0.0,
) -> DivergenceTerms:
    """Return an unbiased D over the student's tokens; every entry's own p must be known.

    Not for `reverse_kl`, whose phi(0) is infinite. An id outside the student's vocabulary takes no
    part in the sum; its mass, where it is always kept, is taken off the tail's. With `log_step`
    only the forward KL is unbiased: of a sampled entry's term of another divergence the mean over
    the dither is off by at most 15 % at T = 1 and 4 % at T = 2 (step 2), as f bends in p.

    Args:
        divergence: D.
        targets: with `inclusion_NK`.
        log_q_NK: the student's log-probabilities of the entries at T; -inf where not known.
        log_q_tail_N: the student's log-probability, at T, of all tokens that are not kept.
        known_NK: bool; entries that the student has a logit for.
        temperature: T, the one `targets.log_z_N` belongs to.
        share: of the tangent in the control variate, 0 to 1; None: `row_share`.
        vocab_size: tokens that the student has a logit for.
        log_step: nats between the values that log p of sampled entries was rounded to.
        rule_highest: highest temperature that the inclusion rule draws for; 0: T itself.
    """
    log_bias, value_bias = dither_bias(log_step, temperature)
    log_p_NK, sampled_NK, weight_NK = _sampled(targets, temperature, log_q_NK.dtype)
    log_p_NK = torch.where(sampled_NK, log_p_NK - log_bias, log_p_NK)
    known_sampled_NK = known_NK & sampled_NK
    whole_N = (known_NK & ~sampled_NK).sum(-1) >= vocab_size
    tail_p_N = _tail_mass(log_p_NK, sampled_NK).masked_fill_(whole_N, 0.0)
    log_tail_q_N = torch.logaddexp(
        log_q_tail_N, log_q_NK.masked_fill(~known_sampled_NK, -torch.inf).logsumexp(-1)
    )
    # No tangent where the teacher's tail has no mass, or the student's no token.
    if share is None:
        always_kept_NK = known_NK & ~sampled_NK
        always_kept_p_NK = log_p_NK.exp().masked_fill(~always_kept_NK, 0.0)
        ratio_NK = (log_p_NK - log_q_NK).masked_fill(~always_kept_NK, 0.0)
        apart_N = (always_kept_p_NK * ratio_NK).sum(-1)
        apart_N = apart_N + tail_p_N * (tail_p_N.log() - log_tail_q_N)
        tiny = torch.finfo(always_kept_p_NK.dtype).tiny
        spread_N = (always_kept_p_NK * ratio_NK.square()).sum(-1)
        spread_N = spread_N / always_kept_p_NK.sum(-1).clamp(min=tiny)
        share_N = row_share(apart_N, spread_N, temperature, rule_highest)
        share_N = torch.where(tail_p_N > 0, share_N, 0.0)
    else:
        share_N = torch.where(tail_p_N > 0, share, 0.0)
    tau_p_N, upsilon_q_N = divergence.halves(tail_p_N.log(), log_tail_q_N)
    tau_p_N = torch.where(share_N > 0, share_N * tau_p_N, 0.0)
    upsilon_q_N = torch.where(share_N > 0, share_N * upsilon_q_N, 0.0)
    upsilon_q_N = upsilon_q_N + (1 - share_N) * divergence.absent * log_tail_q_N.exp()

    x_NK, u_NK = divergence.halves(log_p_NK, log_q_NK)
    x_NK, u_NK = x_NK.masked_fill_(~known_NK, 0.0), u_NK.masked_fill_(~known_NK, 0.0)
    in_tail_NK = (log_q_NK - log_tail_q_N[:, None]).exp().masked_fill_(~known_sampled_NK, 0.0)
    control_u_NK = upsilon_q_N[:, None] * in_tail_NK
    p_NK = log_p_NK.exp().masked_fill(~sampled_NK, 0.0)
    control_x_NK = (tau_p_N / tail_p_N.clamp(min=torch.finfo(p_NK.dtype).tiny))[:, None] * p_NK
    difference_NK = (x_NK - control_x_NK) + (u_NK - control_u_NK)
    value_N = (weight_NK * difference_NK).sum(-1) + tau_p_N + upsilon_q_N
    if value_bias and divergence.name == "forward_kl":
        value_N = value_N - value_bias * (weight_NK * p_NK).masked_fill(~known_NK, 0.0).sum(-1)
    u_NK = torch.addcmul(control_u_NK, weight_NK, u_NK - control_u_NK)
    u_tail_N = upsilon_q_N * (log_q_tail_N - log_tail_q_N).exp()
    return gradient_terms(value_N, u_NK, u_tail_N, log_q_NK, log_q_tail_N)


def _sampled(
    targets: HeadTargets, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p at T (-inf at padding), which entries were sampled, and 1 / pi."""
    assert targets.inclusion_NK is not None
    log_p_NK = targets.logprobs_NK.to(dtype) / temperature - targets.log_z_N.to(dtype)[:, None]
    sampled_NK = torch.isfinite(log_p_NK) & (targets.inclusion_NK < 1)
    return log_p_NK, sampled_NK, targets.inclusion_NK.to(dtype).reciprocal()


def _tail_mass(log_p_NK: Tensor, sampled_NK: Tensor) -> Tensor:
    """Return the teacher's mass outside the always-kept ones; values from a grid can exceed 1."""
    return (1.0 - log_p_NK.exp().masked_fill_(sampled_NK, 0.0).sum(-1)).clamp_(min=0.0)
