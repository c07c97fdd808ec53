"""Parts of DeepSpeed beside its engine: Muon, which ZeRO optimiser is taken, file access."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.storage.local import require_writable
from pipeline.student.settings.train import TrainSettings

__all__ = [
    "check_offload_folder",
    "keep_convolutions_whole",
    "keep_gradient_norm",
    "make_muon",
    "one_kind_of_zero_optimizer",
]


def make_muon(settings: TrainSettings, groups: Sequence[dict[str, Any]]) -> Any:
    """Return DeepSpeed's Muon for matrices, with AdamW for the groups where `use_muon` is false.

    Not torch's: under ZeRO an optimiser sees flat pieces of the weights, and only DeepSpeed's gives
    it whole matrices.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    made = []
    for group in groups:
        own: dict[str, Any] = {"lr": settings.learning_rate, **group}
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
        if not group["use_muon"]:
            own |= {"betas": (settings.adam_beta1, settings.adam_beta2), "eps": 1e-8}
        made.append(own)
    return MuonWithAuxAdam(made)


@contextmanager
def one_kind_of_zero_optimizer() -> Iterator[None]:
    """While open, stage 1 in bfloat16 with float32 sums is ZeRO's optimiser, as in float16.

    DeepSpeed has another one for this case alone, whose checkpoints do not go to a run with
    another number of passes a step and which prints its memory while it is made.
    """
    from deepspeed.runtime.engine import BFLOAT16, ZERO_OPTIMIZATION
    from deepspeed.runtime.engine import DeepSpeedEngine as Engine

    choose = Engine._do_optimizer_sanity_check

    def chosen(self: Any, optimizer: Any) -> Any:
        wrapper = choose(self, optimizer)
        return ZERO_OPTIMIZATION if wrapper == BFLOAT16 else wrapper

    Engine._do_optimizer_sanity_check = chosen
    try:
        yield
    finally:
        Engine._do_optimizer_sanity_check = choose


def keep_convolutions_whole(engine: Any) -> None:
    """Let an engine of ZeRO 3 keep the weights of short convolutions on every rank.

    ZeRO 3 gathers a module's weights when the module is called. Layers with a state hand those of
    their convolution to a kernel without calling it, and would find nothing there. They are a few
    thousand numbers a layer; DeepSpeed keeps parameters of up to 100,000 numbers whole by itself,
    but only from the first update on.
    """
    from torch import nn

    kept = engine.optimizer.persistent_parameters
    found: list[Any] = [
        parameter
        for module in engine.module.modules()
        if isinstance(module, nn.Conv1d)
        for parameter in module.parameters(recurse=False)
    ]
    for parameter in found:
        if not parameter.ds_persist:
            parameter.ds_persist = True
            kept.append(parameter)
    if found:
        kept[0].all_gather(kept)


def keep_gradient_norm(engine: Any) -> None:
    """Let an engine without ZeRO keep the norm that it clips by; it throws it away by itself."""
    from deepspeed.runtime.utils import clip_grad_norm_

    def clip() -> None:
        engine._global_grad_norm = clip_grad_norm_(
            parameters=engine.module.parameters(),
            max_norm=engine.gradient_clipping(),
            mpu=engine.mpu,
        )

    engine.clip_fp32_gradients = clip


def check_offload_folder(settings: TrainSettings, *, on_gpu: bool) -> None:
    """Reject an offload folder that cannot be written, or that DeepSpeed cannot use here.

    Raises:
        StoreError: it cannot be made or written.
        ConfigError: this machine lacks what asynchronous file access is built from.
    """
    if settings.offload_folder is None:
        return
    require_writable(Path(settings.offload_folder), "train.offload_folder")
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        raise ConfigError(
            f"train.offload_folder: found {settings.offload_folder}, and DeepSpeed's asynchronous "
            "file access cannot be built here",
            expected="libaio with its headers, and a C++ compiler",
            do="install libaio-dev (Debian) or libaio-devel, or leave train.offload_folder out, "
            "which offloads to CPU memory",
        )
