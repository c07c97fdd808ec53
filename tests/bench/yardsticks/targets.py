"""What a student is told at each token: gradients on its logits at T = 1, by method.

Methods of other papers are rebuilt on exact log-probs (`tests.bench.peers.rebuilt`); this
project's own go through its cache and its loss. Legend: R rows of logits, V vocabulary; p and q
are teacher and student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.collate import Batch
from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.spec import LossSpec
from pipeline.teacher.sparsify.device import SparseScheme
from tests.bench.fidelity_cache import head_targets
from tests.bench.peers.seam import Peer

__all__ = [
    "Rows", "Rule", "chosen_positions", "cross_entropy", "dense", "from_cache", "from_peer",
    "jensen_shannon", "reverse_kl",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rows:
    """Some supervised tokens of one sequence."""

    log_p_RV: Tensor
    logits_RV: Tensor
    """The student's."""
    label_R: Tensor
    tokens_R: NDArray[np.int64]
    """Numbers of these tokens among all that are trained on, rising."""


Rule = Callable[[Rows], Tensor]
"""Returns d divergence / d logits [R, V]."""


def dense(rows: Rows) -> Tensor:
    """Forward KL(p | q) over the whole vocabulary."""
    return torch.softmax(rows.logits_RV, -1).sub_(rows.log_p_RV.exp())


def cross_entropy(rows: Rows) -> Tensor:
    """The token of the text alone."""
    q_RV = torch.softmax(rows.logits_RV, -1)
    return q_RV.scatter_add_(1, rows.label_R[:, None], torch.full_like(q_RV[:, :1], -1.0))


def reverse_kl(rows: Rows) -> Tensor:
    """KL(q | p): its gradient is q (log q / p - KL)."""
    log_q_RV = torch.log_softmax(rows.logits_RV, -1)
    q_RV = log_q_RV.exp()
    ratio_RV = log_q_RV.sub_(rows.log_p_RV)
    kl_R1 = (q_RV * ratio_RV).sum(-1, keepdim=True)
    return ratio_RV.sub_(kl_R1).mul_(q_RV)


def jensen_shannon(rows: Rows) -> Tensor:
    """KL(p | m) / 2 + KL(q | m) / 2 with m the mean of both: q (log q / m - KL(q | m)) / 2."""
    log_q_RV = torch.log_softmax(rows.logits_RV, -1)
    q_RV = log_q_RV.exp()
    ratio_RV = log_q_RV.sub_(((q_RV + rows.log_p_RV.exp()) / 2).log_())
    kl_R1 = (q_RV * ratio_RV).sum(-1, keepdim=True)
    return ratio_RV.sub_(kl_R1).mul_(q_RV).div_(2)


def from_peer(peer: Peer) -> Rule:
    """Return the rule of a rebuilt method: stored and read back at every row."""
    (loss,) = peer.losses.values()
    return lambda rows: loss.gradient(peer.store(rows.log_p_RV), rows.logits_RV, 1.0)


def from_cache(batch: Batch, scheme: SparseScheme) -> Rule:
    """Return this project's own loss on targets that its cache returned, of all tokens."""
    targets = head_targets(batch)
    spec = LossSpec(
        1.0, 1.0, "auto",
        sampled_log_step=scheme.quantisation.sampled_step,
        rule_highest=scheme.rule.highest if scheme.rule else 0.0,
    )  # fmt: skip

    def rule(rows: Rows) -> Tensor:
        first, last = int(rows.tokens_R[0]), int(rows.tokens_R[-1])
        assert last - first + 1 == len(rows.tokens_R), "a stretch of tokens"
        gradient_RV = rows.logits_RV.clone()
        sparse_loss_(gradient_RV, targets.rows(first, last + 1), spec)
        return gradient_RV

    return rule


def chosen_positions(score_N: Tensor, share: float) -> Tensor:
    """Return, rising, the places of the highest scores of a sequence: ceil(share N) of them."""
    count = max(1, int(np.ceil(share * len(score_N))))
    return score_N.topk(count).indices.sort().values
