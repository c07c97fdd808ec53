"""TRL: the forward KL of its trainer with a teacher behind a server, by its own code.

Nothing is stored: the server sends the top-k log-probs of each step. They are the teacher's at
T = 1 whatever temperature the request names (vLLM computes prompt log-probs without one), while the
student's are divided by it; T = 2 is run just so. The forward KL is `beta` 0; with its default of 1
the trainer takes the reverse KL of the written token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.bench.peers.checkout import Checkout, Project, load
from tests.bench.peers.seam import Loss, Peer, Stored, gradient_of, top_k

__all__ = ["PROJECT", "peers"]

_AT = "trl/experimental/server_distillation/server_distillation_trainer.py"
PROJECT = Project("trl", "TRL", "https://github.com/huggingface/trl", (_AT,))


@dataclass
class _Sent:
    name: str
    options: str
    losses: Mapping[str, Loss]
    kept: float
    rebuilds: bool = False

    def store(self, teacher_RV: Tensor) -> Stored:
        """Return what the server sends."""
        return Stored(*top_k(teacher_RV, int(self.kept)))

    def stored_bytes(self) -> None:
        """Nothing is stored."""


def peers(checkout: Checkout, vocabulary: int) -> list[Peer]:
    """Return the default's one entry and 64, each with the tail's bucket and without."""
    del vocabulary
    name = "trl.experimental.server_distillation.server_distillation_trainer"
    absent = {
        "trl.experimental.distillation.distillation_trainer": {"DistillationTrainer": object},
        "trl.experimental.server_distillation.server_distillation_config": {
            "ServerDistillationConfig": object
        },
    }
    trainer = load(checkout, {name: _AT}, absent=absent)[name].ServerDistillationTrainer
    tail, none = _loss(trainer, add_tail=True), _loss(trainer, add_tail=False)
    options = "beta 0, loss_top_k {}, loss_add_tail as named; nothing stored"
    return [
        _Sent("TRL, loss_top_k 1 (default)", options.format(1), {"loss_add_tail": tail}, 1),
        _Sent(
            "TRL, loss_top_k 64", options.format(64),
            {"loss_add_tail": tail, "loss_add_tail false": none}, 64,
        ),
    ]  # fmt: skip


def _loss(trainer: Any, *, add_tail: bool) -> Loss:
    holder = SimpleNamespace(
        loss_add_tail=add_tail, _reduce_divergence_loss=trainer._reduce_divergence_loss
    )

    def gradient(stored: Stored, student_RV: Tensor, temperature: float) -> Tensor:
        rows = len(student_RV)
        sent = {"topk_logprobs": stored.logprobs_RK[None], "topk_token_ids": stored.ids_RK[None]}

        def divergence(logits_RV: Tensor) -> Tensor:
            log_q_1RV = torch.log_softmax(logits_RV[None] / temperature, -1)
            mean: Tensor = trainer._compute_server_forward_kl_loss(
                holder, sent, log_q_1RV, torch.zeros(1, rows, dtype=torch.int64)
            )
            return mean * rows

        return gradient_of(divergence, student_RV, temperature)

    return Loss(gradient)
