"""Other tools' losses on a top-k target, as dense gradients on the student's logits / T.

Reimplemented from their documents and papers; named in `tests.bench.fidelity`'s table. Legend: R
rows, V vocabulary; p and q are teacher and student at temperature T, `kept_RV` the teacher's top k.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draws", "renormalised_both", "unnormalised", "zero"]


def zero(p_1_RV: Tensor, kept_RV: Tensor, q_RV: Tensor, temperature: float) -> Tensor:
    """Teacher renormalised over the kept, student full: DistillKit's `zero`, Axolotl.

    From cached log-probs at T = 1 the target at T is softmax over the kept of log p / T.
    """
    log_p_RV = (p_1_RV.log() / temperature).masked_fill(~kept_RV, -torch.inf)
    return q_RV - torch.softmax(log_p_RV, -1)


def unnormalised(p_1_RV: Tensor, kept_RV: Tensor, q_RV: Tensor, temperature: float) -> Tensor:
    """Kept entries as they are, nothing for the rest: verl. At T != 1 p is scaled by its own Z."""
    p_RV = p_1_RV ** (1 / temperature)
    p_RV = (p_RV / p_RV.sum(-1, keepdim=True)).masked_fill(~kept_RV, 0.0)
    return p_RV.sum(-1, keepdim=True) * q_RV - p_RV


def renormalised_both(p_1_RV: Tensor, kept_RV: Tensor, q_RV: Tensor, temperature: float) -> Tensor:
    """Both renormalised over the kept: ms-swift, MaxText, NeMo-Aligner."""
    log_p_RV = (p_1_RV.log() / temperature).masked_fill(~kept_RV, -torch.inf)
    kept_q_RV = q_RV.masked_fill(~kept_RV, 0.0)
    return kept_q_RV / kept_q_RV.sum(-1, keepdim=True) - torch.softmax(log_p_RV, -1)


def draws(p_1_RV: Tensor, count: int, q_RV: Tensor, temperature: float, seed: int) -> Tensor:
    """`count` draws from p with replacement (random-sampling KD), re-tempered where T != 1."""
    generator = torch.Generator().manual_seed(seed)
    sampled_RN = torch.multinomial(p_1_RV, count, replacement=True, generator=generator)
    weight_RV = torch.zeros_like(p_1_RV).scatter_add_(
        1, sampled_RN, torch.full(sampled_RN.shape, 1 / count)
    )
    if temperature != 1.0:  # p^(1/T) / p times the estimate of p, renormalised
        weight_RV = weight_RV * p_1_RV ** (1 / temperature - 1)
        weight_RV = weight_RV / weight_RV.sum(-1, keepdim=True)
    return weight_RV.sum(-1, keepdim=True) * q_RV - weight_RV
