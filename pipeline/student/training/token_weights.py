"""The weights of a step's tokens: scores of all ranks and micro-batches, to a mean of 1.

Shapes: N targets of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.data.collate import Batch
from pipeline.loss.settings import LossSettings
from pipeline.loss.tokens.weights import WeightSums, disagreement, raw_weights, threshold_of
from pipeline.student.training.deepspeed_engine import DeepSpeedEngine
from pipeline.student.training.module import module_inputs

__all__ = ["StepWeights"]


class StepWeights:
    """How much each token of a step counts; what there is to say of the last step's weights."""

    def __init__(self, engine: DeepSpeedEngine, loss: LossSettings) -> None:
        """Keep the parts."""
        self._engine = engine
        self._loss = loss
        self._sums: WeightSums | None = None

    def of_step(self, batches: Sequence[Batch]) -> list[Tensor | None]:
        """Return the weights of each micro-batch's targets, their shares of positions included.

        All ranks call it: a step's weights have the mean 1 over the tokens of all. On a GPU
        nothing is waited for, but with a quantile, for which ranks compare scores on the host.

        Returns:
            float32 [N] for each micro-batch; None where all targets count alike.
        """
        if self._loss.weight == "uniform":
            return [batch.share_N for batch in batches]
        scores = [self._score(batch) for batch in batches]
        threshold = None
        if self._loss.weight_quantile is not None:
            mine = [score_N.cpu().numpy() for score_N in scores]
            every = [part for rank in self._engine.gather_objects(mine) for part in rank]
            threshold = threshold_of(every, self._loss.weight_quantile)
        raws = [
            raw_weights(score_N, temperature=self._loss.weight_temperature, threshold=threshold)
            for score_N in scores
        ]
        parts = [
            WeightSums.of(raw_N, batch.share_N) for raw_N, batch in zip(raws, batches, strict=True)
        ]
        self._sums = WeightSums(*self._engine.total_over_ranks(torch.stack(parts).sum(0)).unbind())
        scale = self._sums.scale().float()
        return [
            raw_N * scale if batch.share_N is None else raw_N * scale * batch.share_N
            for raw_N, batch in zip(raws, batches, strict=True)
        ]

    def report(self) -> dict[str, float]:
        """Return what is logged of the last step's weights; waits for the device."""
        return {} if self._sums is None else self._sums.report()

    def _score(self, batch: Batch) -> Tensor:
        if self._loss.weight != "student_disagreement":
            if batch.score_N is None:  # a rank without work
                return torch.zeros_like(batch.label_logprob_N)
            return batch.score_N
        inputs: dict[str, Any] = module_inputs(batch, scale=1.0)
        terms = self._engine.evaluate({**inputs, "temperature": self._loss.temperature})[1]
        return disagreement(batch.label_logprob_N, terms.ce_N)
