"""Axolotl: its preparation of offline log-probs and the loss of its KD trainer, by its own code.

The trainer's fused function takes hidden states and weight; the divergence that it differentiates,
`distillation_loss_fn`, is called here on logits. (Its backward leaves out the T^2 that its reported
loss has; the benches take that factor out of every loss.) The data are prepared for one
temperature, so that T = 2 is another data set than T = 1. Liger is not needed for either and has a
stand-in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.bench.peers.checkout import Checkout, Project, load
from tests.bench.peers.seam import Loss, Peer, Stored, gradient_of, top_k

__all__ = ["PROJECT", "peers"]

_KD = "axolotl.integrations.kd"
_AT = "src/axolotl/integrations/kd"
PROJECT = Project(
    "axolotl", "Axolotl", "https://github.com/axolotl-ai-cloud/axolotl",
    (f"{_AT}/chat_template.py", f"{_AT}/kernels/liger.py"),
)  # fmt: skip
TOP_K = 64


class _Strategy:
    """Stands in for the base class, whose work is the chat template."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take what the base class takes."""


@dataclass
class _Prepared:
    name: str
    options: str
    losses: Mapping[str, Loss]
    strategy: Any
    kept: float = TOP_K
    rebuilds: bool = False
    _bytes: int = field(default=0, init=False)

    def store(self, teacher_RV: Tensor) -> Stored:
        """Prepare one sequence of these rows, at T = 1 and at T = 2."""
        import datasets

        ids_RK, logprobs_RK = top_k(teacher_RV, TOP_K)
        more: dict[str, Any] = {}
        for temperature in (1.0, 2.0):
            made = self._prepare(ids_RK, logprobs_RK, temperature)
            more[f"{temperature:g}"] = {
                "ids": torch.tensor(made["target_token_ids"]),
                "logprobs": torch.tensor(made["target_logprobs"]),
                "mask": torch.tensor(made["target_mask"]),
            }
            if temperature == 1.0:
                rows = {key: [value] for key, value in made.items() if key.startswith("target_")}
                self._bytes += datasets.Dataset.from_dict(rows).data.nbytes
        return Stored(ids_RK, logprobs_RK, more)

    def _prepare(self, ids_RK: Tensor, logprobs_RK: Tensor, temperature: float) -> dict[str, Any]:
        strategy = self.strategy(
            None, None, True, len(ids_RK), kd_temperature=temperature, gen_temperature=1.0
        )
        filler = [0] * len(ids_RK)
        made: dict[str, Any] = strategy.transform_logprobs({
            "input_ids": filler, "labels": filler, "logprobs": logprobs_RK.tolist(),
            "target_token_ids": ids_RK.tolist(),
        })  # fmt: skip
        return made

    def stored_bytes(self) -> int:
        """Ids, log-probs and mask of the prepared data for one T, as `datasets` has them."""
        return self._bytes


def peers(checkout: Checkout, vocabulary: int) -> list[Peer]:
    """Return the prepared data with the student renormalised over the kept entries, or not."""
    del vocabulary
    base = "liger_kernel.chunked_loss.fused_linear_distillation"
    modules = load(
        checkout,
        {
            f"{_KD}.utils": f"{_AT}/utils.py",
            f"{_KD}.kernels.liger": f"{_AT}/kernels/liger.py",
            f"{_KD}.chat_template": f"{_AT}/chat_template.py",
        },
        absent={
            base: {"LigerFusedLinearDistillationBase": torch.autograd.Function},
            "axolotl.prompt_strategies.chat_template": {
                "ChatTemplateStrategy": _Strategy, "StrategyLoader": object,
            },
            "axolotl.utils.logging": {"get_logger": lambda name: None},
        },
    )  # fmt: skip
    function = modules[f"{_KD}.kernels.liger"].LigerFusedLinearKLTopKLogprobFunction
    strategy = modules[f"{_KD}.chat_template"].ChatTemplateStrategyWithKDv2
    options = f"top_k {TOP_K}, chat_template v2 data, kd_beta 0; kd_normalize_topk as named"
    losses = {
        "default": _loss(function, normalize_topk=False),
        "kd_normalize_topk": _loss(function, normalize_topk=True),
    }
    return [_Prepared(f"Axolotl, k = {TOP_K}", options, losses, strategy)]


def _loss(function: Any, *, normalize_topk: bool) -> Loss:
    def gradient(stored: Stored, student_RV: Tensor, temperature: float) -> Tensor:
        data = stored.more[f"{temperature:g}"]

        def divergence(logits_RV: Tensor) -> Tensor:
            summed: Tensor = function.distillation_loss_fn(
                logits_RV / temperature, data["ids"], data["logprobs"], data["mask"],
                beta=0.0, normalize_topk=normalize_topk,
            )  # fmt: skip
            return summed

        return gradient_of(divergence, student_RV, temperature)

    return Loss(gradient)
