"""The loss as its definition reads: dense, float64, one row at a time; for tests, not for use.

Shapes: N counted tokens, K entries of the fullest one, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.loss.settings import TailPolicy
from pipeline.loss.types import HeadTargets

__all__ = ["cross_entropy", "dense_kl", "loss_sum", "sparse_kl"]


def dense_kl(logits_NV: Tensor, teacher_logprobs_NV: Tensor, *, temperature: float) -> Tensor:
    """Return KL(p_T || q_T) of each token, in nats, over the whole vocabulary."""
    log_p_NV = torch.log_softmax(teacher_logprobs_NV.double() / temperature, dim=-1)
    log_q_NV = torch.log_softmax(logits_NV.double() / temperature, dim=-1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def cross_entropy(logits_NV: Tensor, gold_N: Tensor) -> Tensor:
    """Return -log q(gold) of each token at temperature 1, in nats."""
    return torch.nn.functional.cross_entropy(logits_NV.double(), gold_N, reduction="none")


def sparse_kl(
    logits_NV: Tensor, targets: HeadTargets, *, temperature: float, tail: TailPolicy
) -> Tensor:
    """Return the forward KL of each token from sparse targets, in nats, under a tail policy."""
    values = [
        _row(logits_NV[n].double(), targets, n, temperature, tail) for n in range(len(logits_NV))
    ]
    return torch.stack(values) if values else logits_NV.new_zeros(0, dtype=torch.float64)


def loss_sum(
    logits_NV: Tensor,
    targets: HeadTargets,
    *,
    temperature: float,
    alpha: float,
    tail: TailPolicy,
) -> Tensor:
    """Return `alpha * T^2 * sum(KL) + (1 - alpha) * sum(CE)`."""
    kd_N = sparse_kl(logits_NV, targets, temperature=temperature, tail=tail)
    ce_N = cross_entropy(logits_NV, targets.gold_N)
    return alpha * temperature**2 * kd_N.sum() + (1 - alpha) * ce_N.sum()


def _row(
    logits_V: Tensor, targets: HeadTargets, n: int, temperature: float, tail: TailPolicy
) -> Tensor:
    log_q_V = torch.log_softmax(logits_V / temperature, dim=-1)
    vocab_size = len(logits_V)
    ids: list[int] = []
    log_targets: list[Tensor] = []
    weights: list[Tensor] = []
    for k in range(targets.ids_NK.shape[1]):
        token, logprob = int(targets.ids_NK[n, k]), targets.logprobs_NK[n, k].double()
        if not torch.isfinite(logprob) or token >= vocab_size:
            continue
        log_p = logprob / temperature - targets.log_z_N[n].double()
        inclusion = 1.0 if targets.inclusion_NK is None else float(targets.inclusion_NK[n, k])
        ids.append(token)
        weights.append(log_p.exp() / inclusion)
        log_targets.append(log_p if tail == "zero" else weights[-1].log())
    if not ids:
        return logits_V.sum() * 0.0
    weight_K, log_target_K = torch.stack(weights), torch.stack(log_targets)
    total = weight_K.sum()
    all_kept = len(ids) == vocab_size
    if tail == "renormalise" or (tail == "bucket" and (total > 1 or all_kept)):
        weight_K, log_target_K = weight_K / total, log_target_K - total.log()
    value = (weight_K * (log_target_K - log_q_V[ids])).sum()
    if tail == "bucket" and total < 1 and not all_kept:
        rest = torch.ones(vocab_size, dtype=torch.bool)
        rest[ids] = False
        w_tail = 1 - total
        value = value + w_tail * (w_tail.log() - log_q_V[rest].logsumexp(0))
    return value
