"""Megatron-LM's offline distillation: its writer's top-k and tar, and its loss, by its own code.

The writer takes logits from a forward hook and writes a tar of zstandard payloads, one of each
iteration; an iteration here is all rows, as micro-batches. The loss has a "ghost" token for the
rest and no temperature, so there is no row at T = 2. Its parallel state has stand-ins for one rank.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor

from tests.bench.peers.checkout import Checkout, Project, load
from tests.bench.peers.seam import Loss, Peer, Stored, gradient_of

__all__ = ["PROJECT", "peers"]

_NAME = "megatron.training.distillation"
_AT = "megatron/training/distillation"
PROJECT = Project(
    "megatron", "Megatron-LM", "https://github.com/NVIDIA/Megatron-LM",
    (f"{_AT}/logits_saver.py", f"{_AT}/cached_logits_loss.py"),
)  # fmt: skip
TOP_K = 64


@dataclass
class _Written:
    name: str
    options: str
    losses: Mapping[str, Loss]
    saver_class: Any
    utils: ModuleType
    top_p: float | None
    kept: float = TOP_K
    rebuilds: bool = True
    _parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Make a writer for one rank."""
        self._folder = tempfile.TemporaryDirectory()
        self._saver = self.saver_class(self._folder.name, TOP_K, p=self.top_p)

    def store(self, teacher_RV: Tensor) -> Stored:
        """Reduce a micro-batch [R, 1, V]; what is written is counted at the end."""
        values_R1K, low_R1K, high_R1K = self._saver._process_single_microbatch(teacher_RV[:, None])
        self._parts.append((values_R1K, low_R1K, high_R1K))
        ids_R1K = self.utils.unpack_indices(low_R1K, high_R1K)
        more = {"values_R1K": values_R1K, "ids_R1K": ids_R1K}
        return Stored(ids_R1K[:, 0], values_R1K[:, 0].float(), more)

    def stored_bytes(self) -> int:
        """Write the tar and return its size."""
        self._saver._buffer_iteration(*map(list, zip(*self._parts, strict=True)))
        path, writes, meta, remote = self._saver.take_pending_data()
        self._saver._write_batched_tar(path, writes, meta, remote)
        return Path(path).stat().st_size


def peers(checkout: Checkout, vocabulary: int) -> list[Peer]:
    """Return top-k as it is and cut at 99 % of the mass."""
    del vocabulary
    one_rank = SimpleNamespace(
        get_tensor_model_parallel_rank=lambda: 0, get_tensor_model_parallel_world_size=lambda: 1,
        get_tensor_model_parallel_group=lambda: None, get_context_parallel_rank=lambda: 0,
        get_tensor_model_parallel_src_rank=lambda: 0, get_data_parallel_rank=lambda: 0,
        get_data_parallel_world_size=lambda: 1,
    )  # fmt: skip
    arguments = SimpleNamespace(mtp_num_layers=0, curr_iteration=1)
    absent: dict[str, dict[str, Any]] = {
        "megatron.core": {"parallel_state": one_rank},
        "megatron.core.models.common.language_module.language_module": {"LanguageModule": object},
        "megatron.core.msc_utils": {
            "MultiStorageClientFeature": SimpleNamespace(is_enabled=lambda: False),
            "maybe_msc": SimpleNamespace(os=os),
        },
        "megatron.core.num_microbatches_calculator": {"get_num_microbatches": lambda: 1},
        "megatron.training": {
            "get_args": lambda: arguments, "get_tensorboard_writer": lambda: None,
        },
        "megatron.training.utils": {
            "print_rank_0": lambda text: None,
            "get_blend_and_blend_per_split": lambda given: (None, None),
        },
    }  # fmt: skip
    names = [f"{_NAME}.{name}" for name in ("utils_logits", "logits_saver", "cached_logits_loss")]
    modules = load(
        checkout, {name: f"{name.replace('.', '/')}.py" for name in names}, absent=absent
    )
    utils, saver, loss = (modules[name] for name in names)
    ghost = {"ghost token": _loss(loss)}
    found: list[Peer] = []
    for top_p in (None, 0.99):
        cut = "" if top_p is None else f", top-p {top_p:g}"
        options = (
            f"logits-save-top-k {TOP_K}, logits-save-top-p {top_p}, logits-save-dtype fp16, "
            "add_ghost_token (fixed in the code)"
        )
        name = f"Megatron-LM, k = {TOP_K}{cut}"
        found.append(_Written(name, options, ghost, saver.LogitsSaverHooks, utils, top_p))
    return found


def _loss(module: ModuleType) -> Loss:
    def gradient(stored: Stored, student_RV: Tensor, temperature: float) -> Tensor:
        def divergence(logits_RV: Tensor) -> Tensor:
            of_each: Tensor = module.topk_kl_div(
                logits_RV[:, None], stored.more["values_R1K"], stored.more["ids_R1K"], 1, 0, None,
                add_ghost_token=True,
            )  # fmt: skip
            return of_each.sum()

        return gradient_of(divergence, student_RV, temperature)

    return Loss(gradient, temperatures=(1.0,))
