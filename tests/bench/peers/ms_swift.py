"""ms-swift: the loss of GKD with a teacher behind an API, by its own code.

Nothing is stored: the server sends the top-k log-probs of each step. The loss is run at `beta` 0,
the forward KL; with its default of 0.5 it is a Jensen-Shannon divergence, whose gradient is not one
of a KL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from tests.bench.peers.checkout import Checkout, Project, load
from tests.bench.peers.seam import Loss, Peer, Stored, gradient_of, top_k

__all__ = ["PROJECT", "peers"]

_FILE = "swift/rlhf_trainers/gkd_loss.py"
PROJECT = Project("ms-swift", "ms-swift", "https://github.com/modelscope/ms-swift", (_FILE,))
TOP_K = 64


@dataclass
class _Sent:
    name: str
    options: str
    losses: Mapping[str, Loss]
    kept: float = TOP_K
    rebuilds: bool = False

    def store(self, teacher_RV: Tensor) -> Stored:
        """Return what the server sends."""
        return Stored(*top_k(teacher_RV, TOP_K))

    def stored_bytes(self) -> None:
        """Nothing is stored."""


def peers(checkout: Checkout, vocabulary: int) -> list[Peer]:
    """Return the loss of its documented example."""
    del vocabulary
    name = "swift.rlhf_trainers.gkd_loss"
    module = load(checkout, {name: _FILE})[name]
    options = f"gkd_logits_topk {TOP_K}, beta 0, temperature T; nothing stored"
    return [_Sent(f"ms-swift, k = {TOP_K}", options, {"": _loss(module)})]


def _loss(module: ModuleType) -> Loss:
    def gradient(stored: Stored, student_RV: Tensor, temperature: float) -> Tensor:
        labels_1R = torch.zeros(1, len(student_RV), dtype=torch.int64)
        sent = module.TeacherOutput(
            topk_logprobs=stored.logprobs_RK[None], topk_indices=stored.ids_RK[None],
            labels=labels_1R,
        )  # fmt: skip

        def divergence(logits_RV: Tensor) -> Tensor:
            total, _ = module.gkd_loss(
                logits_RV[None], sent, labels_1R, beta=0.0, temperature=temperature
            )
            assert isinstance(total, Tensor)
            return total

        return gradient_of(divergence, student_RV, temperature)

    return Loss(gradient)
