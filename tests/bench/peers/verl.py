"""verl: its distillation by top-k forward KL, by its own code.

Nothing is stored: a teacher in the same cluster sends the top-k log-probs of each step. It has no
temperature of distillation (its teacher is always asked at T = 1), so there is no row at T = 2.
`distillation_loss` with the registered `forward_kl_topk` is called as the trainer calls it: a
token's negative divergence counts as zero, which gives it no gradient, and both clamps apply. Its
aggregation over the batch is replaced by a sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.bench.peers.checkout import Checkout, Project, load
from tests.bench.peers.seam import Loss, Peer, Stored, gradient_of, top_k

__all__ = ["PROJECT", "peers"]

_AT = "verl/trainer/distillation"
PROJECT = Project(
    "verl", "verl", "https://github.com/verl-project/verl",
    (f"{_AT}/losses.py", f"{_AT}/fsdp/losses.py"),
)  # fmt: skip


@dataclass
class _Sent:
    name: str
    options: str
    losses: Mapping[str, Loss]
    kept: float
    rebuilds: bool = False

    def store(self, teacher_RV: Tensor) -> Stored:
        """Return what the teacher sends."""
        return Stored(*top_k(teacher_RV, int(self.kept)))

    def stored_bytes(self) -> None:
        """Nothing is stored."""


class _Metric:
    """Stands in for the trainer's metrics."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take what it takes."""


def _summed(loss_mat: Tensor, loss_mask: Tensor, **_: Any) -> Tensor:
    return loss_mat[loss_mask].sum()


def peers(checkout: Checkout, vocabulary: int) -> list[Peer]:
    """Return the defaults of its configuration and those of its example scripts."""
    del vocabulary
    absent = {
        "tensordict": {"TensorDict": dict},
        "verl.base_config": {"BaseConfig": object},
        "verl.trainer.ppo.core_algos": {
            "agg_loss": _summed, "get_policy_loss_fn": None, "kl_penalty": None,
        },
        "verl.utils.metric": {
            "AggregationType": SimpleNamespace(MIN=0, MAX=1, SUM=2), "Metric": _Metric,
        },
        "verl.workers.config": {
            "ActorConfig": object, "DistillationConfig": object, "DistillationLossConfig": object,
        },
        "verl.workers.utils.losses": {"ppo_loss": None},
        "verl.workers.utils.padding": {"no_padding_2_padding": lambda values, data: values},
        "verl.utils.ulysses": {
            "get_ulysses_sequence_parallel_world_size": lambda: 1, "slice_input_tensor": None,
        },
    }  # fmt: skip
    names = ("verl.trainer.distillation.fsdp.losses", "verl.trainer.distillation.losses")
    files = dict(zip(names, (f"{_AT}/fsdp/losses.py", f"{_AT}/losses.py"), strict=True))
    modules = load(checkout, files, absent=absent)
    kernel, losses = (modules[name] for name in names)
    found: list[Peer] = []
    for words, k, highest, lowest in (
        ("yaml defaults", 32, None, None), ("example scripts", 64, 10.0, -10.0),
    ):  # fmt: skip
        options = (
            f"loss_mode forward_kl_topk, topk {k}, loss_max_clamp {highest}, "
            f"log_prob_min_clamp {lowest}, use_policy_gradient false; nothing stored"
        )
        loss = _loss(kernel, losses, k, highest, lowest)
        found.append(_Sent(f"verl, k = {k} ({words})", options, {"": loss}, k))
    return found


def _loss(
    kernel: ModuleType, losses: ModuleType, k: int, highest: float | None, lowest: float | None
) -> Loss:
    setting = SimpleNamespace(
        loss_mode="forward_kl_topk", topk=k, loss_max_clamp=highest, log_prob_min_clamp=lowest,
        use_policy_gradient=False, use_chunked_topk=False,
    )  # fmt: skip
    config = SimpleNamespace(distillation_loss=setting)
    actor = SimpleNamespace(loss_agg_mode="sum", global_batch_info={}, loss_scale_factor=None)

    def gradient(stored: Stored, student_RV: Tensor, temperature: float) -> Tensor:
        rows = len(student_RV)
        ends_2 = torch.tensor([0, rows])
        jagged = torch.nested.nested_tensor_from_jagged
        data = {
            "response_mask": torch.ones(1, rows, dtype=torch.bool),
            "dp_size": 1, "batch_num_tokens": rows, "global_batch_size": 1,
        }  # fmt: skip

        def divergence(logits_RV: Tensor) -> Tensor:
            found = kernel.compute_forward_kl_topk(
                logits_RV[None], jagged(stored.logprobs_RK, ends_2), jagged(stored.ids_RK, ends_2),
                config, "thd",
            )  # fmt: skip
            total, _ = losses.distillation_loss(actor, config, found, data)
            assert isinstance(total, Tensor)
            return total

        return gradient_of(divergence, student_RV, temperature)

    return Loss(gradient, temperatures=(1.0,))
