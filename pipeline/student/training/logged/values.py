"""The losses of a step, which stay on the device until somebody reads them.

Reading a number of a GPU makes the host wait for all that the device has to do, so that the next
step cannot be prepared meanwhile. Sums are kept where they are made; `read` is called at logged
steps, and before an evaluation or a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import DistillError
from pipeline.loss.settings import LossSettings
from pipeline.student.training.deepspeed_engine import DeepSpeedEngine

__all__ = ["StepValues"]

_FINITE = -1
"""In place of the number of the first step whose loss is not finite."""


class StepValues:
    """Losses of the last step, and which step was the first whose loss is not finite."""

    def __init__(self, engine: DeepSpeedEngine, loss: LossSettings, divergence: str) -> None:
        """Keep the parts; `divergence` is the name under which D is logged."""
        self._engine = engine
        self._loss = loss
        self._divergence = divergence
        self._sums_2: Tensor | None = None
        """float64: of this rank's divergence and cross-entropy."""
        self._first_bad: Tensor | None = None
        self._loss_tokens = 1

    def add(self, outputs: Sequence[Any], *, step: int, loss_tokens: int) -> None:
        """Take the terms of a step; waits for nothing.

        Args:
            outputs: what the module returned for each micro-batch: (loss, `LossTerms`).
            step: its number, from 1.
            loss_tokens: supervised tokens of all ranks and micro-batches.
        """
        sums_2: Tensor | None = None
        for _, terms in outputs:
            part_2 = torch.stack([terms.divergence_N.double().sum(), terms.ce_N.double().sum()])
            sums_2 = part_2 if sums_2 is None else sums_2 + part_2
        assert sums_2 is not None, "a step has at least one micro-batch"
        self._sums_2, self._loss_tokens = sums_2, loss_tokens
        if self._first_bad is None:
            self._first_bad = torch.full((), _FINITE, dtype=torch.int64, device=sums_2.device)
        is_first = (self._first_bad == _FINITE) & ~self._mixed(*sums_2.unbind()).isfinite()
        self._first_bad = self._first_bad.masked_fill(is_first, step)

    def read(self) -> dict[str, float]:
        """Return the losses of the last step over all ranks; all ranks call it.

        Raises:
            DistillError: the loss of a step since the last call is not finite; names the first.
        """
        assert self._sums_2 is not None
        assert self._first_bad is not None
        bad = (self._first_bad != _FINITE).double()
        sums = self._engine.sum_over_ranks(torch.cat([self._sums_2, bad[None]]))
        if sums[2]:
            firsts = self._engine.gather_objects(int(self._first_bad))
            step = min(first for first in firsts if first != _FINITE)
            raise DistillError(
                f"the loss is not finite at step {step}",
                do="lower train.learning_rate, or train in bfloat16 or float32; the last "
                "checkpoint is complete",
            )
        divergence, entropy = (value / self._loss_tokens for value in sums[:2])
        return {
            "train/loss": self._mixed(divergence, entropy),
            f"train/{self._divergence}": divergence,
            "train/cross_entropy": entropy,
        }

    def _mixed(self, divergence: Any, entropy: Any) -> Any:
        alpha = self._loss.alpha
        return alpha * self._loss.temperature**2 * divergence + (1 - alpha) * entropy
