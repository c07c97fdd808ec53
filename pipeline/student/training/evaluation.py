"""The student on the held-out rows, all ranks together, and the names of what it scores."""

from __future__ import annotations

from typing import Any

from pipeline.data.collate import Batch
from pipeline.data.source import RowSource
from pipeline.data.stream.heldout_stream import heldout_stream
from pipeline.data.transfer import Transfer
from pipeline.evaluate.heldout import PartialScores, merge_scores, score_batches
from pipeline.evaluate.measures import HeldoutScores
from pipeline.student.sequence.parallel import SequenceParallel
from pipeline.student.training.deepspeed_engine import DeepSpeedEngine
from pipeline.student.training.module import module_inputs

__all__ = ["HeldoutEvaluation"]

_TOKENS = 2048


class HeldoutEvaluation:
    """Scores the engine's student at temperature 1."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        rows: RowSource,
        *,
        longest: int,
        distance: str,
        sequence: SequenceParallel,
    ) -> None:
        """Keep the parts.

        Args:
            engine: with the student.
            rows: the held-out ones, in the student's tokens.
            longest: tokens of the longest sequence.
            distance: `kl` or `kl_bucketed`, or `uld` across tokenizers.
            sequence: how ranks share a batch.
        """
        self._sequence = sequence
        self._engine = engine
        self._rows = rows
        self._tokens = max(_TOKENS, longest)
        self._distance = distance
        self._transfer = Transfer(engine.device)

    def run(self) -> HeldoutScores:
        """Score every row once over all ranks."""
        group = self._sequence.group
        with heldout_stream(
            self._rows,
            tokens_per_batch=self._tokens,
            temperature=1.0,
            rank=group.data_rank,
            world_size=group.data_size,
        ) as batches:
            part = score_batches(batches, self._forward, across_tokenizers=self._distance == "uld")
        # All ranks of a group have the scores of all its slices.
        return merge_scores(
            self._engine.gather_objects(part if group.part == 0 else PartialScores())
        )

    def metrics(self, scores: HeldoutScores) -> dict[str, float]:
        """Return the scores under the names in which they are logged."""
        named = {scores.distance: self._distance}
        if self._distance == "kl_bucketed":
            named["acceptance"] = "acceptance_bound"
        values = {
            f"heldout/{named.get(name, name)}": scores.mean(name).value for name in scores.sums
        }
        values["heldout/perplexity"] = scores.perplexity().value
        ece = scores.calibration_error()
        if ece is not None:
            values["heldout/ece"] = ece.value
        for tag, own in scores.by_tag().items():
            values |= {
                f"heldout/{named.get(name, name)}/{tag}": own.mean(name).value for name in own.sums
            }
            values[f"heldout/perplexity/{tag}"] = own.perplexity().value
        return values

    def _forward(self, batch: Batch) -> Any:
        part = self._sequence.slice(batch)
        inputs = module_inputs(self._transfer.move(part.batch), scale=1.0)
        terms = self._engine.evaluate({**inputs, "predictions": True, "temperature": 1.0})[1]
        return self._sequence.join(terms, part)
