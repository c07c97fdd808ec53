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

from pipeline.data.collate import Batch
from pipeline.errors import DistillError
from pipeline.loss.settings import LossSettings
from pipeline.student.training.deepspeed_engine import DeepSpeedEngine

__all__ = ["StepValues"]

_FINITE = -1
"""In place of the number of the first step whose loss is not finite."""


class StepValues:
    """Losses of the last step, and which step was the first whose loss is not finite."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        loss: LossSettings,
        divergence: str,
        tags: Sequence[str] = (),
    ) -> None:
        """Keep the parts.

        Args:
            engine: of the run.
            loss: its settings.
            divergence: the name under which D is logged.
            tags: of a mixture's caches, whose losses are logged one by one as well.
        """
        self._engine = engine
        self._loss = loss
        self._divergence = divergence
        self._tags = tuple(tags)
        self._sums: Tensor | None = None
        """float64: this rank's divergence and cross-entropy, as they are and times the tokens'
        weights; then targets, divergence and cross-entropy of each cache."""
        self._first_bad: Tensor | None = None
        self._loss_tokens = 1

    def add(
        self,
        outputs: Sequence[Any],
        *,
        step: int,
        loss_tokens: int,
        batches: Sequence[Batch] = (),
        weights: Sequence[Tensor | None] = (),
    ) -> None:
        """Take the terms of a step; waits for nothing.

        Args:
            outputs: what the module returned for each micro-batch: (loss, `LossTerms`).
            step: its number, from 1.
            loss_tokens: supervised tokens of all ranks and micro-batches.
            batches: the micro-batches, where targets have shares of positions or are of several
                caches.
            weights: of the targets of each micro-batch; none: their shares of positions.
        """
        sums: Tensor | None = None
        for number, (_, terms) in enumerate(outputs):
            batch = batches[number] if batches else None
            part = self._part(terms, batch, weights[number] if weights else None)
            sums = part if sums is None else sums + part
        assert sums is not None, "a step has at least one micro-batch"
        self._sums, self._loss_tokens = sums, loss_tokens
        if self._first_bad is None:
            self._first_bad = torch.full((), _FINITE, dtype=torch.int64, device=sums.device)
        is_first = (self._first_bad == _FINITE) & ~self._mixed(*sums[:2].unbind()).isfinite()
        self._first_bad = self._first_bad.masked_fill(is_first, step)

    def _part(self, terms: Any, batch: Batch | None, weight_N: Tensor | None) -> Tensor:
        """Return the sums of one micro-batch; see `_sums`."""
        values_2N = torch.stack([terms.divergence_N.double(), terms.ce_N.double()])
        share_N = None if batch is None else batch.share_N
        plain_2N = values_2N if share_N is None else values_2N * share_N
        weighted_2N = plain_2N if weight_N is None else values_2N * weight_N
        sums = [plain_2N.sum(1), weighted_2N.sum(1)]
        if self._tags:
            of_cache_C3 = values_2N.new_zeros(len(self._tags), 3)
            if batch is not None and batch.teacher_N is not None:
                rows_N3 = torch.stack([torch.ones_like(values_2N[0]), *values_2N], dim=1)
                of_cache_C3.index_add_(0, batch.teacher_N, rows_N3)
            sums.append(of_cache_C3.flatten())
        return torch.cat(sums)

    def read(self) -> dict[str, float]:
        """Return the losses of the last step over all ranks; all ranks call it.

        Raises:
            DistillError: the loss of a step since the last call is not finite; names the first.
        """
        assert self._sums is not None
        assert self._first_bad is not None
        bad = (self._first_bad != _FINITE).double()
        *sums, any_bad = self._engine.sum_over_ranks(torch.cat([self._sums, bad[None]]))
        if any_bad:
            firsts = self._engine.gather_objects(int(self._first_bad))
            step = min(first for first in firsts if first != _FINITE)
            raise DistillError(
                f"the loss is not finite at step {step}",
                do="lower train.learning_rate, or train in bfloat16 or float32; the last "
                "checkpoint is complete",
            )
        divergence, entropy, *weighted = (value / self._loss_tokens for value in sums[:4])
        values = {
            "train/loss": self._mixed(*weighted),
            f"train/{self._divergence}": divergence,
            "train/cross_entropy": entropy,
        }
        for place, tag in enumerate(self._tags):
            count, of_divergence, of_entropy = sums[4 + 3 * place : 7 + 3 * place]
            if count:  # a step may have none of a cache
                values[f"train/{self._divergence}/{tag}"] = of_divergence / count
                values[f"train/cross_entropy/{tag}"] = of_entropy / count
        return values

    def _mixed(self, divergence: Any, entropy: Any) -> Any:
        alpha = self._loss.alpha
        return alpha * self._loss.temperature**2 * divergence + (1 - alpha) * entropy
