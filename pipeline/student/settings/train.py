"""Settings of the training: optimisation, parallelism, checkpoints; imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from pipeline.config import option, rule
from pipeline.models.precision import PrecisionSettings
from pipeline.student.settings.parallel import ParallelSettings
from pipeline.student.settings.profile_window import profile_window
from pipeline.student.settings.sequence import SequenceSettings

__all__ = ["TrainSettings"]


class TrainSettings(ParallelSettings, SequenceSettings, PrecisionSettings):
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
    optim: Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "muon", "sgd", "rmsprop"] = (
        option(
            "adamw_torch_fused",
            "optimiser, as transformers names it; `adamw_8bit`: moments in 8 bits, by bitsandbytes "
            "or torchao; `muon`: matrices of the layers by Muon, the rest by AdamW",
            flag="optim",
        )
    )
    learning_rate: float = option(2e-5, "peak learning rate", flag="learning_rate", gt=0)
    learning_rates: dict[str, float] = option(
        {},
        "peak learning rates of some parameters: regular expressions of their names, the first "
        "that fits counts, as in `{embed_tokens: 1e-6}`",
    )
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
    torch_compile: bool = option(
        False,
        "compile the decoder layers (ZeRO 0 to 2; minutes once, for a faster step)",
        flag="torch_compile",
    )
    ema_decay: float | None = option(
        None,
        "evaluate at the end and export an exponential moving average of the weights: the share of "
        "it that each step keeps, such as 0.999 (ZeRO 0 to 2; float32, divided among the "
        "processes)",
        gt=0,
        lt=1,
    )
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
    cpu_threads: int | None = option(
        None,
        "on a CPU: threads that compute, once the initial weights are made (none: all cores)",
        ge=1,
    )
    timeout_s: float = option(
        600, "a dead or stalled peer ends the run after this many seconds", gt=0
    )

    def stage(self, *, dtype: str, world_size: int) -> int:
        """Return the ZeRO stage that is used, chosen where none is named.

        Args:
            dtype: of the weights: `float32`, `bfloat16` or `float16`.
            world_size: processes.
        """
        stage = self.zero_stage
        if stage is None:
            # Stage 2 reduces the gradients of each forward pass, stage 1 those of each step.
            divided = 1 if self.gradient_accumulation_steps > 1 else 2
            alone = world_size == 1 and dtype == "float32" and not self.offload_optimizer
            stage = 3 if self.needs_stage_3 else 0 if alone else divided
        # DeepSpeed's optimiser of 16-bit weights without ZeRO takes a step on zero gradients when
        # it is made: moments and their bias correction are one step ahead.
        return stage if dtype == "float32" else max(stage, 1)

    def accumulates_float32(self, *, dtype: str) -> bool:
        """Whether gradients are summed in a wider type than that of the weights."""
        wider = dtype != "float32" and self.gradient_accumulation_steps > 1
        return wider and self.accumulate_float32

    @property
    def evaluates(self) -> bool:
        """Whether the run reads held-out rows at any time."""
        return self.evaluate != "never" or self.evaluate_before

    @rule
    def _profile_is_a_window(self) -> Iterator[str]:
        if self.profile_steps is not None:
            try:
                profile_window(self.profile_steps)
            except ValueError as error:
                yield str(error)

    @rule
    def _evaluations_in_the_middle(self) -> Iterator[str]:
        if self.eval_steps is not None and self.evaluate == "never":
            yield (
                f"train.eval_steps: found {self.eval_steps} with train.evaluate never, expected "
                "none"
            )

    @rule
    def _average_needs_whole_weights(self) -> Iterator[str]:
        if self.ema_decay is not None and (self.zero_stage == 3 or self.needs_stage_3):
            yield (
                f"train.ema_decay: found {self.ema_decay} with ZeRO 3, whose processes hold parts "
                "of the weights; expected stage 0, 1 or 2, or none"
            )

    @rule
    def _rates_of_patterns(self) -> Iterator[str]:
        for pattern, rate in self.learning_rates.items():
            try:
                re.compile(pattern)
            except re.error as error:
                yield (
                    f"train.learning_rates: found {pattern!r}, expected a regular expression "
                    f"({error})"
                )
            if rate < 0:
                yield (f"train.learning_rates: found {rate}, expected 0 or more")

    @rule
    def _compile_needs_gathered_weights(self) -> Iterator[str]:
        if self.torch_compile and (self.zero_stage == 3 or self.needs_stage_3):
            cause = self.needs_stage_3[:1] or ["zero_stage"]
            yield (
                f"train.torch_compile: found true with train.{cause[0]} "
                f"{self.shown(cause[0])}, and ZeRO 3's gathering of weights breaks every graph; "
                "expected stage 0, 1 or 2, or no compilation"
            )
