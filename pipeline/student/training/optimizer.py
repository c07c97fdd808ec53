"""Optimisers and schedules under the names transformers gives them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from pipeline.errors import ConfigError
from pipeline.models.device import uses_gpu
from pipeline.program import how_to_install
from pipeline.student.settings.train import TrainSettings

__all__ = ["check_schedule", "has_rank_free_form", "make_optimizer", "make_schedule"]

_STATE_OF_ADAM = ("adamw_torch", "adamw_torch_fused")


def make_optimizer(settings: TrainSettings, groups: Sequence[dict[str, Any]]) -> Any:
    """Return torch's optimiser for these parameter groups, made as transformers' Trainer does.

    Only those that treat each number by itself: ZeRO hands them flat pieces of the weights, split
    where the ranks meet. Adafactor's factored moments and its clipping by tensor would depend on
    the split; Adagrad is built again by DeepSpeed, without the groups' weight decay.
    """
    import torch

    rate = settings.learning_rate
    if settings.optim in _STATE_OF_ADAM:
        return torch.optim.AdamW(
            list(groups),
            lr=rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            fused=settings.optim == "adamw_torch_fused",
        )
    if settings.optim == "adamw_8bit":
        betas = (settings.adam_beta1, settings.adam_beta2)
        return _adamw_8bit()(list(groups), lr=rate, betas=betas)
    kind = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}[settings.optim]
    return kind(list(groups), lr=rate)


def _adamw_8bit() -> Any:
    """Return the class of a package that is installed.

    Raises:
        ConfigError: none that this machine can use.
    """
    if uses_gpu() and importlib.util.find_spec("bitsandbytes"):
        return importlib.import_module("bitsandbytes.optim").AdamW8bit
    if importlib.util.find_spec("torchao"):
        return importlib.import_module("torchao.optim").AdamW8bit
    raise ConfigError(
        "train.optim: found adamw_8bit without a package that has it",
        expected="torchao, or bitsandbytes on a GPU",
        do=f"{how_to_install('student', 'torchao')}, or choose another --optim",
    )


def make_schedule(settings: TrainSettings, optimizer: Any, *, total_steps: int) -> Any:
    """Return the learning-rate schedule over `total_steps` optimiser steps."""
    from transformers import get_scheduler

    warmup = round(settings.warmup_ratio * total_steps)
    specific: dict[str, Any] = {}
    if settings.lr_scheduler_type in ("cosine_with_min_lr", "warmup_stable_decay"):
        key = "min_lr_rate" if "cosine" in settings.lr_scheduler_type else "min_lr_ratio"
        specific[key] = settings.min_lr_rate
    if settings.lr_scheduler_type == "warmup_stable_decay":
        decay = round(settings.lr_decay_ratio * total_steps)
        specific["num_decay_steps"] = max(1, min(decay, total_steps - warmup))
    return get_scheduler(
        settings.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=specific,
    )


def check_schedule(settings: TrainSettings, *, total_steps: int) -> None:
    """Make optimiser and schedule for one number, to see whether they take the settings.

    Raises:
        ConfigError: they do not, such as a learning rate below the one a schedule ends at, or a
            package is missing.
    """
    import torch

    if settings.optim == "adamw_8bit":
        _adamw_8bit()
    if settings.optim not in (*_STATE_OF_ADAM, "rmsprop"):
        settings = settings.model_copy(update={"optim": "sgd"})  # the schedule is the same
    try:
        group = {"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": 0.0}
        make_schedule(settings, make_optimizer(settings, [group]), total_steps=total_steps)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"train.lr_scheduler_type: {settings.lr_scheduler_type} is refused "
            f"({str(error).strip().splitlines()[0]})",
            do="change train.learning_rate or the schedule",
        ) from None


def has_rank_free_form(settings: TrainSettings) -> bool:
    """Whether a checkpoint of this optimiser can go to another number of ranks under ZeRO.

    DeepSpeed's universal form knows Adam's two moments and nothing else.
    """
    return settings.optim in _STATE_OF_ADAM
