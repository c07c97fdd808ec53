"""Sequence parallelism of a run on one process: what it slices, exchanges and joins."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import Any

from pipeline.data.collate import Batch
from pipeline.data.stream.train_stream import StepBatch
from pipeline.errors import ModelError
from pipeline.loss.targets import LossTerms
from pipeline.student.forward.ways import BodyForward
from pipeline.student.sequence.attention import SequenceAttention
from pipeline.student.sequence.groups import SequenceGroup, connect_group
from pipeline.student.sequence.join import join_terms
from pipeline.student.sequence.sliced import SlicedForward
from pipeline.student.sequence.slices import BatchSlice, slice_batch
from pipeline.student.sequence.trial import run_slice_trial

__all__ = ["SequenceParallel"]


class SequenceParallel:
    """This process's place in its group.

    Where a group is one process, slices are whole and nothing is exchanged.
    """

    def __init__(self, group: SequenceGroup) -> None:
        """Connect the group; every rank of the run does, once and at the same place."""
        self.group = group
        self._process_group = connect_group(group)

    def install(self, forward: BodyForward, model: Any, *, device: Any) -> BodyForward:
        """Return a forward that takes slices; the model takes nothing else from here on.

        All ranks call it at once.

        Args:
            forward: the body, in the way that was chosen.
            model: of transformers, of which it is the body.
            device: where the weights are.

        Raises:
            ModelError: the way is `alone`, or slices change the hidden states.
        """
        if not self.group.is_shared:
            return forward
        if forward.way == "alone":
            raise ModelError(
                f"{type(model).__name__} goes one sequence at a time",
                expected="a student that can be packed, under train.sequence_parallel_size",
                do="train it with train.sequence_parallel_size 1",
            )
        attention = SequenceAttention(self._process_group)
        sliced = SlicedForward(forward, attention)
        run_slice_trial(
            forward, sliced, model, install=lambda: attention.install(model), group=self.group,
            device=device,
        )  # fmt: skip
        return sliced

    def slice(self, batch: Batch) -> BatchSlice:
        """Return this process's slice of a micro-batch, which is on the CPU."""
        return slice_batch(batch, part=self.group.part, size=self.group.size)

    def slice_steps(
        self, steps: Generator[StepBatch, None, None]
    ) -> Generator[StepBatch, None, None]:
        """Yield the steps with this process's slices in them; closing it closes `steps`."""
        with closing(steps):
            for step in steps:
                mine = [self.slice(batch).batch for batch in step.micro_batches]
                yield replace(step, micro_batches=mine)

    def join(self, terms: LossTerms, part: BatchSlice) -> LossTerms:
        """Return the terms of all slices of a held-out batch, on every process of the group."""
        if not self.group.is_shared:
            return terms
        return join_terms(terms, part.counts, self._process_group)
