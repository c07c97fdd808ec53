"""How often a teacher accepts the student's token: the student as its draft model.

In speculative decoding a draft token, taken from the student's q, is accepted by the teacher's p
with the probability sum_j min(p_j, q_j) (Leviathan, Kalman and Matias 2023), which is 1 less the
total variation distance. Of the stored entries:

- always-kept ones give their terms exactly. Over a top-k alone the sum is a lower bound: at most
  the lesser of the two tails' masses is missing;
- sampled ones are weighted by 1 / pi, which is unbiased, since pi depends on p alone.

Sampled log p is rounded with a dither: x = log p + u, u uniform in [-h, h]. A minimum of q and
of the p that was read, right on average, would be too small: by a quarter where p = q. But

    g(x) = exp(x - 2 h m) h / sinh(h),   m = max(0, ceil((x - log q - h) / 2h)),

has the mean min(p, q) for every p and q: below log q + h it is the corrected exponential, whose
mean is p, and from there on it repeats itself every 2h, so that the mean stays at q.

Shapes: N supervised tokens, K entries of the fullest one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.loss.targets import HeadTargets
from pipeline.sampling.quantisation import rounding_log_bias

__all__ = ["accepted_mass"]


def accepted_mass(
    log_q_NK: Tensor, targets: HeadTargets, known_NK: Tensor, *, log_step: float
) -> Tensor:
    """Return the estimate (or the bound, of a top-k) of sum_j min(p_j, q_j) at temperature 1, [N].

    Args:
        log_q_NK: the student's log-probabilities of the entries at temperature 1.
        targets: as cached.
        known_NK: bool; entries that the student has a logit for.
        log_step: nats between the values that log p of sampled entries was rounded to; 0: none.
    """
    log_p_NK = targets.logprobs_NK.to(log_q_NK.dtype)
    least_NK = torch.minimum(log_p_NK, log_q_NK)
    if targets.inclusion_NK is not None:
        pi_NK = targets.inclusion_NK.to(log_q_NK.dtype)
        x_NK = log_p_NK
        if log_step:
            above_NK = (log_p_NK - log_q_NK - log_step / 2) / log_step
            turns_NK = above_NK.ceil().clamp_(min=0)
            x_NK = log_p_NK - log_step * turns_NK - rounding_log_bias(log_step, 1.0)
        else:
            x_NK = least_NK
        least_NK = torch.where(pi_NK < 1, x_NK - pi_NK.log(), least_NK)
    return least_NK.masked_fill(~known_NK, -torch.inf).exp().sum(-1)
