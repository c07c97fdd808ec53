"""Unbiased divergence from sampled entries, with the student's own tail as control variate.

The teacher's always-kept entries H are known exactly; of the tail, entry j was sampled with
probability pi_j, independently of the student. Any sum over the tail is then estimated without bias
by sum_S x_j / pi_j over the sampled S (Horvitz and Thompson 1952), and so is

    sum_tail f(p_j, q_j) = E[ C + sum_S (f(p_j, q_j) - c_j) / pi_j ],   C = sum_tail c_j,

for every control variate c whose sum over the tail is known. The closer c is to f, the lower the
variance. The tail's masses P and Q, of the teacher and of the student, are known, so c may be any
linear combination of p_j and q_j; the natural choice is the tangent of f at the ratio P / Q, which
is exact where the teacher's tail has the shape of the student's: c = tau p + upsilon q with tau,
upsilon the derivatives of f at (P, Q). Its error is of second order, and with it alone (share 1, no
sampled entries) the estimate is that of the tail bucket: C = f(P, Q).

Where q >> p, the correction (f - c) / pi is large; there the p = 0 limit, c = phi(0) q, is
better. The mixture `share * tangent + (1 - share) * limit` is unbiased for any share. For
forward KL phi(0) = 0 and upsilon = -P / Q: the target is w_j = p_j on H and elsewhere

    w_j = kappa q_j + [j sampled] (p_j - kappa q_j) / pi_j,   kappa = share * P / Q.

The best share depends on how close the student is to the teacher: `row_share`. It may depend on
anything but the sample, so it is computed from the row's always-kept entries.

The gradient treats tau and upsilon as constants (they belong to the estimator, not to the
estimand), so its expectation is the exact gradient, while it is not the derivative of the single
estimate.

Shapes: N supervised tokens, K entries of the fullest one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.loss.divergence import DivergenceTerms, FDivergence, gradient_terms
from pipeline.loss.targets import HeadTargets
from pipeline.sampling.quantisation import rounding_log_bias

__all__ = ["default_share", "dither_bias", "row_share", "sampled_terms"]


def default_share(temperature: float, rule_highest: float = 0.0) -> float:
    """Return 1.14 - 0.8 / T, and 0.12 more below the rule's highest temperature, within 0 and 1.

    The share of a row on which the student agrees with the teacher. Where q is far above p, an
    entry's correction is share * q / pi, and pi falls with p, faster at a lower temperature, so the
    share at T = 1 is smaller. An inclusion rule that also covers T = 2 samples such entries more
    often, which allows a larger share at T = 1.
    """
    below = min(max(rule_highest - temperature, 0.0), 1.0)
    return min(max(0.0, 1.14 - 0.8 / temperature + 0.12 * below), 1.0)


def row_share(
    divergence_N: Tensor, spread_N: Tensor, temperature: float, rule_highest: float = 0.0
) -> Tensor:
    """Return the share of each row: default_share / ((1 + 2 D)^(2 / T) (1 + v / 8)).

    D alone is not enough: it is small wherever the always-kept entries have little mass, and for a
    student far from the teacher those rows dominate the error. v is a mean, so it does not depend
    on their mass. The optimal share of a row is 1 / (1 + chi^2), of the two tails, and chi^2 grows
    with the variance of log p / q in the tail, for which v is a proxy.

    Expected squared error of the weight gradient over that without a control variate; in brackets
    for a student far from the teacher, pruned to six layers and not yet trained (`make
    bench-control`, `--pruned`; the exact expectation over all samples): T = 1 under the inclusion
    rule of T = 1 alone 0.81 (2.7), under that of T = 1 and 2 0.68 (2.0); T = 2 0.32 (0.85). With D
    alone the far student had 4.0, 3.7, 1.12. A constant share of 0.15, which looks best in four
    samples, has 1.01 (14,000): one sample of eight held a token of q = 5,000 p and had 2.5 times
    the error.

    Args:
        divergence_N: D, over the always-kept entries and the rest as one outcome, at T.
        spread_N: v, the mean of (log p - log q)^2 over the always-kept entries, weighted by p, at
            T.
        temperature: T.
        rule_highest: highest temperature that the inclusion rule covers; 0: T itself.
    """
    near_N = (1 + 2 * divergence_N.clamp(min=0.0)) ** (2 / temperature) * (1 + spread_N / 8)
    return default_share(temperature, rule_highest) / near_N


def dither_bias(log_step: float, temperature: float) -> tuple[float, float]:
    """Return log E[e^u] and E[u e^u] / E[e^u] - log E[e^u], u uniform in +-log_step / (2 T).

    The bias of a sampled entry that was rounded with dither: log p / T is read with u added, so the
    mean of p_T is too large by the factor e^first, and, after that correction, the mean of p_T log
    p_T by p_T times second. With a step of 2 nats: 0.161 and 0.152 at T = 1, 0.041 and 0.042 at T =
    2.
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
    bucketed_N: Tensor | None = None,
) -> DivergenceTerms:
    """Return an unbiased D over the student's tokens; every entry's own p must be known.

    Not for `reverse_kl`, whose phi(0) is infinite. An id outside the student's vocabulary takes no
    part in the sum; if it is always kept, its mass is subtracted from the tail's. With `log_step`
    only the forward KL is unbiased: for the other divergences, which are not linear in p, the mean
    over the dither of a sampled entry's term is off by at most 15 % at T = 1 and 4 % at T = 2
    (step 2).

    Args:
        divergence: D.
        targets: with `inclusion_NK`.
        log_q_NK: the student's log-probabilities of the entries at T; -inf where not known.
        log_q_tail_N: the student's log-probability, at T, of all tokens that are not kept.
        known_NK: bool; entries that the student has a logit for.
        temperature: T, the one `targets.log_z_N` belongs to.
        share: weight of the tangent in the control variate, 0 to 1; None: `row_share`.
        vocab_size: tokens that the student has a logit for.
        log_step: nats between the values that log p of sampled entries was rounded to.
        rule_highest: highest temperature that the inclusion rule covers; 0: T itself.
        bucketed_N: bool; targets of a top-k, whose rest is one outcome. None: there is none.
    """
    log_bias, value_bias = dither_bias(log_step, temperature)
    log_p_NK, sampled_NK, weight_NK = _sampled(targets, temperature, log_q_NK.dtype)
    log_p_NK = torch.where(sampled_NK, log_p_NK - log_bias, log_p_NK)
    known_sampled_NK = known_NK & sampled_NK
    whole_N = (known_NK & ~sampled_NK).sum(-1) >= vocab_size
    in_rest_NK = sampled_NK
    if bucketed_N is not None:  # a bucket holds what is outside the student's vocabulary as well
        in_rest_NK = sampled_NK | (bucketed_N[:, None] & ~known_NK)
    tail_p_N = _tail_mass(log_p_NK, in_rest_NK).masked_fill_(whole_N, 0.0)
    log_tail_q_N = torch.logaddexp(
        log_q_tail_N, log_q_NK.masked_fill(~known_sampled_NK, -torch.inf).logsumexp(-1)
    )
    # No tangent where the teacher's tail has no mass or the student's tail has no token.
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
    if bucketed_N is not None:
        # Nothing was sampled there, so the tangent alone: f of the two tails, as of a bucket.
        share_N = torch.where(bucketed_N & (tail_p_N > 0), 1.0, share_N)
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


def _tail_mass(log_p_NK: Tensor, in_rest_NK: Tensor) -> Tensor:
    """Return the teacher's mass outside the other entries; quantised masses can exceed 1."""
    return (1.0 - log_p_NK.exp().masked_fill_(in_rest_NK, 0.0).sum(-1)).clamp_(min=0.0)
