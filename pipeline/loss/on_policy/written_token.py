"""The policy gradient of per-token reverse KL, from the written token's log-prob alone.

KL(q | p) = E_{y ~ q}[log q(y) - log p(y)], and its gradient is E_{y ~ q}[c grad log q(y)] with
c = log q(y) - log p(y): the term that differentiates c itself is E[grad log q(y)] = 0. So each
written token y gives the gradient of -A log q(y), A = -c held constant: what the public on-policy
recipes call the advantage is the teacher's log-prob of y less the student's. On the logits z it is

    dL/dz_j = c ([j = y] - q_j),

a cross-entropy gradient with the weight -c. Only log p(y) is needed of the teacher.

What it promises: the expectation over tokens that the student itself draws at temperature 1, with
no filter, is the gradient of the reverse KL at each context; of the contexts, those that were
written. A single token's gradient is noise around it, whose variance the dense reverse KL does not
have. Text of an earlier student is off-policy: E over q_written is corrected token by token by the
ratio r = q(y) / q_written(y) where the cache holds the written log-probs; r is clipped from above
(truncated importance sampling), which bounds the variance and biases what exceeds the clip. For
text from another distribution m (another model, another temperature, a filter) and no ratio, it is
the gradient of 1/2 E_{y ~ m}[(log q(y) - log p(y))^2] instead: least at q = p as well, but no KL,
and the logged mean of c, an estimate of the reverse KL on the student's own text, can be below 0.
The teacher's log p(y) is a label's code: off by up to 3 % of itself, 6 % in a sampled cache.

Shapes: N supervised tokens, K = 1: the written token is the only entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.loss.divergence import DivergenceTerms
from pipeline.loss.targets import HeadTargets

__all__ = ["written_token_coefficient", "written_token_targets", "written_token_terms"]


def written_token_targets(targets: HeadTargets) -> HeadTargets:
    """Return targets whose only entry is the written token, so that the head keeps no other."""
    label_N = targets.label_N
    return targets._replace(
        ids_NK=label_N[:, None],
        logprobs_NK=torch.zeros_like(label_N[:, None], dtype=torch.float32),
        inclusion_NK=None,
    )


def written_token_coefficient(
    targets: HeadTargets, log_q_N: Tensor, importance_clip: float | None
) -> Tensor:
    """Return c = r (log q(y) - log p(y)) of each token, in nats; an estimate of the reverse KL.

    Args:
        targets: with the teacher's log-probs of the labels and, for a clip, the writer's.
        log_q_N: the student's log-probs of the labels at temperature 1.
        importance_clip: the most that r may be; None: r is 1.
    """
    assert targets.label_logprob_N is not None, "the batch carries it"
    apart_N = log_q_N - targets.label_logprob_N.to(log_q_N.dtype)
    if importance_clip is None:
        return apart_N
    assert targets.written_logprob_N is not None, "pipeline.student.compatibility rejects it"
    log_ratio_N = log_q_N - targets.written_logprob_N.to(log_q_N.dtype)
    return apart_N * log_ratio_N.exp().clamp(max=importance_clip)


def written_token_terms(
    targets: HeadTargets, log_q_NK: Tensor, log_q_tail_N: Tensor, importance_clip: float | None
) -> DivergenceTerms:
    """Return the estimate, and c (1 - q_y) and -c (1 - q_y): the gradients on y and on the rest.

    Args:
        targets: from `written_token_targets`.
        log_q_NK: the student's log-probs of the written tokens at temperature 1, K = 1.
        log_q_tail_N: its log-prob of all other tokens together.
        importance_clip: see `written_token_coefficient`.
    """
    coefficient_N = written_token_coefficient(targets, log_q_NK[:, 0], importance_clip)
    pull_N = coefficient_N * log_q_tail_N.exp()
    return DivergenceTerms(coefficient_N, pull_N[:, None].clone(), -pull_N)
