"""Universal logit distillation: the distance of sorted probabilities, for different vocabularies.

Boizard, El Haddad, Hudelot, Colombo (2024), "Towards Cross-Tokenizer Distillation: the Universal
Logit Distillation Loss for LLMs": sort both next-token distributions, whatever their tokens are,
and add up |q_(r) - p_(r)| over the ranks. That is the Wasserstein distance for a cost of 1 between
any two ranks. A sparse cache holds the first K ranks of the teacher; the others are one outcome:

    D = sum_{r <= K} |q_(r) - p_(r)|  +  |(1 - sum_{r <= K} q_(r)) - (1 - sum_{r <= K} p_(r))|

By the triangle inequality D is at most the full distance, and equal to it where one of the two
distributions is at least the other at every rank beyond K. It lies between 0 and 2, at temperature
1. For a token without entries D is 0. Only the student's K likeliest tokens are needed, so the
vocabulary is never sorted as a whole.

Shapes: N tokens of the chunk, K entries of the fullest one, R = min(K, V) ranks, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.loss.entry_gradient import RowTerms, join_rows
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets

__all__ = ["uld_loss_"]

_BLOCK_BYTES = 8 << 20
"""Bytes of the rows processed together on a CPU: few enough to stay in its cache over all
passes."""


def uld_loss_(
    logits_NV: Tensor,
    targets: HeadTargets,
    spec: LossSpec,
    *,
    gradient: bool = True,
    predictions: bool = False,
) -> RowTerms:
    """Compute `alpha * D + (1 - alpha) * CE` of each token; the logits become its gradient.

    The signature is that of `sparse_loss_`. The entries' ids are the teacher's and are not
    used; the labels are the student's.

    Args:
        logits_NV: float64, float32, bfloat16 or float16; DESTROYED.
        targets: the teacher's largest entries, all always kept, in any order.
        spec: alpha; the temperature is 1.
        gradient: False leaves the logits in an undefined state.
        predictions: also return the argmax and its log-probability.
    """
    rows, vocab_size = logits_NV.shape
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    block = max(rows, 1)
    if logits_NV.device.type == "cpu":
        block = max(1, _BLOCK_BYTES // (vocab_size * dtype.itemsize))
    parts = []
    for start in range(0, rows, block) if rows else (0,):
        logits_nV = logits_NV[start : start + block]
        work_nV = logits_nV.to(dtype)
        parts.append(_block_(work_nV, targets.rows(start, start + block), spec, predictions))
        if gradient and work_nV.dtype != logits_nV.dtype:
            logits_nV.copy_(work_nV)
    return join_rows(parts)


def _block_(x_NV: Tensor, targets: HeadTargets, spec: LossSpec, predictions: bool) -> RowTerms:
    vocab_size = x_NV.shape[1]
    ranks = min(targets.logprobs_NK.shape[1], vocab_size)
    p_NR, known_NR = _sorted_teacher(targets, ranks, x_NV.dtype)
    z_label_N = x_NV.gather(1, targets.label_N[:, None])[:, 0]
    top_NR = x_NV.topk(max(ranks, 1), dim=-1)
    max_N1 = top_NR.values[:, :1].clone()
    ids_NR = top_NR.indices[:, :ranks]
    q_NV = x_NV.sub_(max_N1).exp_()
    sum_N1 = q_NV.sum(-1, keepdim=True)
    q_NV.div_(sum_N1)
    log_z_N = max_N1[:, 0] + sum_N1.log()[:, 0]
    q_NR = q_NV.gather(1, ids_NR)

    # Ranks without an entry belong to the rest.
    difference_NR = torch.where(known_NR, q_NR - p_NR, 0.0)
    known_q_N = torch.where(known_NR, q_NR, 0.0).sum(-1)
    known_p_N = p_NR.sum(-1)
    rest_N = known_p_N - known_q_N  # = (1 - known q) - (1 - known p)
    has_rest_N = known_NR.sum(-1) < vocab_size
    rest_N = torch.where(has_rest_N & known_NR.any(-1), rest_N, 0.0)
    divergence_N = difference_NR.abs().sum(-1) + rest_N.abs()
    ce_N = log_z_N - z_label_N
    best_N = top_NR.indices[:, 0] if predictions else None
    best_logprob_N = top_NR.values[:, 0] - log_z_N if predictions else None

    # dD/dq is a sign: one for each known rank and one for the rest; through the softmax
    # dD/dz = q (s - sum s q). Cross-entropy adds q and takes one from the label token.
    sign_rest_N1 = torch.sign(rest_N)[:, None]
    above_NR = torch.where(known_NR, torch.sign(difference_NR) - sign_rest_N1, 0.0)
    mean_N1 = sign_rest_N1 + (above_NR * q_NR).sum(-1, keepdim=True)
    alpha = spec.alpha
    q_NV.mul_(alpha * (sign_rest_N1 - mean_N1) + (1 - alpha))
    q_NV.scatter_add_(1, ids_NR, alpha * above_NR * q_NR)
    label_N1 = torch.full_like(z_label_N, alpha - 1)[:, None]
    q_NV.scatter_add_(1, targets.label_N[:, None], label_N1)
    return RowTerms(divergence_N, ce_N, best_N, best_logprob_N)


def _sorted_teacher(targets: HeadTargets, ranks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return p in descending order, 0 where there is no entry, and a mask of the entries; [N, R].

    Quantised values can sum to more than 1; they are then scaled to 1.
    """
    logprobs_NR = targets.logprobs_NK.to(dtype).sort(-1, descending=True).values[:, :ranks]
    known_NR = torch.isfinite(logprobs_NR)
    p_NR = logprobs_NR.exp()
    return p_NR / p_NR.sum(-1, keepdim=True).clamp(min=1.0), known_NR
