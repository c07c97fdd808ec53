"""Settings of the training: optimisation, parallelism, checkpoints; imports nothing heavy."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from pipeline.config import option
from pipeline.models.precision import PrecisionSettings
from pipeline.student.profile_window import profile_window
from pipeline.student.sequence_settings import SequenceSettings

__all__ = ["TrainSettings"]


class TrainSettings(SequenceSettings, PrecisionSettings):
    """Optimisation, precision, parallelism and checkpoints."""

    num_train_epochs: float = option(3, "passes over the cache", flag="num_train_epochs", gt=0)
    max_steps: int | None = option(
        None, "optimiser steps, instead of epochs", flag="max_steps", ge=1
    )
    per_device_train_batch_size: int = option(
        1, "packed sequences in one forward pass", flag="per_device_train_batch_size", ge=1
    )
    gradient_accumulation_steps: int = option(
        8, "forward passes in one step", flag="gradient_accumulation_steps", ge=1
    )
    optim: Literal["adamw_torch_fused", "adamw_torch", "sgd", "rmsprop"] = option(
        "adamw_torch_fused", "optimiser, as transformers names it", flag="optim"
    )
    learning_rate: float = option(2e-5, "peak learning rate", flag="learning_rate", gt=0)
    weight_decay: float = option(
        0.05, "weight decay, not applied to biases and norms", flag="weight_decay", ge=0
    )
    adam_beta1: float = option(0.9, "AdamW's", ge=0, lt=1)
    adam_beta2: float = option(0.95, "AdamW's", ge=0, lt=1)
    warmup_ratio: float = option(
        0.1,
        "share of the steps that warm up the learning rate",
        flag="warmup_ratio",
        ge=0,
        le=1,
    )
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = option("cosine", "learning-rate schedule", flag="lr_scheduler_type")
    min_lr_rate: float = option(
        0.1, "last rate over the peak: cosine_with_min_lr, warmup_stable_decay", ge=0, le=1
    )
    lr_decay_ratio: float = option(
        0.2, "share of the steps in which the rate decays: warmup_stable_decay", gt=0, le=1
    )
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm (0: not)", ge=0)
    zero_stage: int = option(2, "DeepSpeed ZeRO stage", ge=0, le=3)
    torch_compile: bool = option(
        False,
        "compile the decoder layers (ZeRO 0 to 2; minutes once, for a faster step)",
        flag="torch_compile",
    )
    offload_optimizer: bool = option(False, "keep the optimiser's state in CPU memory")
    save_steps: int = option(1000, "steps between checkpoints", flag="save_steps", ge=1)
    keep_checkpoints: int = option(2, "complete checkpoints kept", ge=1)
    logging_steps: int = option(1, "steps between logged values", flag="logging_steps", ge=1)
    profile_steps: str | None = option(
        None,
        "first:last, such as 10:12: profile these steps of the first process by torch.profiler, "
        "into output_dir/profile (none: no profile)",
    )
    eval_steps: int | None = option(
        None, "steps between held-out evaluations (none: at the end)", ge=1
    )
    evaluate: Literal["end", "never"] = option(
        "end",
        "held-out evaluation of the trained student: at the `end` (and every eval_steps), or "
        "`never`: with evaluate_before false as well the cache needs no held-out rows, and report "
        "and card have no held-out measures",
    )
    evaluate_before: bool = option(True, "evaluate the untrained student as well")
    resume_from_checkpoint: str = option(
        "auto",
        "`auto`: the newest complete checkpoint of this run; `never`: start from the beginning; or "
        "a folder",
        flag="resume_from_checkpoint",
    )
    timeout_s: float = option(
        600, "a dead or stalled peer ends the run after this many seconds", gt=0
    )

    @property
    def evaluates(self) -> bool:
        """Whether the run reads held-out rows at any time."""
        return self.evaluate != "never" or self.evaluate_before

    @model_validator(mode="after")
    def _profile_is_a_window(self) -> Self:
        if self.profile_steps is not None:
            profile_window(self.profile_steps)
        return self

    @model_validator(mode="after")
    def _evaluations_in_the_middle(self) -> Self:
        if self.eval_steps is not None and self.evaluate == "never":
            raise ValueError(
                f"train.eval_steps: found {self.eval_steps} with train.evaluate never, expected "
                "none"
            )
        return self

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> Self:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "train.offload_optimizer: found true with train.zero_stage 0, which keeps the "
                "optimiser's state on the device; expected stage 1, 2 or 3"
            )
        return self

    @model_validator(mode="after")
    def _compile_needs_gathered_weights(self) -> Self:
        if self.torch_compile and self.zero_stage == 3:
            raise ValueError(
                "train.torch_compile: found true with train.zero_stage 3, whose gathering of "
                "weights breaks every graph; expected stage 0, 1 or 2, or no compilation"
            )
        return self
