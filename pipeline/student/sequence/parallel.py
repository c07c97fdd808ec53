"""Sequence parallelism of a run on one process: what it slices, exchanges and joins."""

from __future__ import annotations

from typing import Any

from pipeline.data.collate import Batch
from pipeline.loss.targets import LossTerms
from pipeline.student.sequence.attention import SequenceAttention
from pipeline.student.sequence.groups import SequenceGroup, connect_group
from pipeline.student.sequence.join import join_terms
from pipeline.student.sequence.slices import BatchSlice, slice_batch

__all__ = ["SequenceParallel"]


class SequenceParallel:
    """This process's place in its group, and the attention of the student in it.

    Where a group is one process, slices are whole and nothing is exchanged.
    """

    def __init__(self, group: SequenceGroup) -> None:
        """Connect the group; every rank of the run does, once and at the same place."""
        self.group = group
        self._process_group = connect_group(group)
        self.attention = SequenceAttention(self._process_group) if group.is_shared else None

    def install(self, model: Any) -> None:
        """Let the model's layers exchange their heads; from here on it takes slices only."""
        if self.attention is not None:
            self.attention.install(model)

    def slice(self, batch: Batch) -> BatchSlice:
        """Return this process's slice of a micro-batch, which is on the CPU."""
        return slice_batch(batch, part=self.group.part, size=self.group.size)

    def join(self, terms: LossTerms, part: BatchSlice) -> LossTerms:
        """Return the terms of all slices of a held-out batch, on every process of the group."""
        if not self.group.is_shared:
            return terms
        return join_terms(terms, part.counts, self._process_group)
