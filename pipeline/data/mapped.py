"""Rows of a cache whose token ids become those of the student.

The ids are mapped as rows are read, not in the head: one gather a row in the thread that reads
ahead, and the model, its head, the loss, checkpoints and the exported student stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.targets import CachedSequence, SparseTargets
from pipeline.data.mixture.rows import MixedSequence
from pipeline.data.source import RowsOver
from pipeline.errors import ModelError

__all__ = ["MappedRows"]

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class MappedRows(RowsOver):
    """A `RowSource` over another one."""

    to_student: Callable[[Ids], Ids]
    """From the teacher's ids to the student's; `size` and more where the student has none."""
    size: int
    name: Callable[[int], str]
    """The teacher's piece of an id, for messages."""

    def shard_sizes(self, shard: int) -> NDArray[np.int32]:
        """Return the source's: pieces map one to one."""
        return self.source.shard_sizes(shard)

    def read_rows(self, shard: int, rows: Sequence[int]) -> list[CachedSequence]:
        """Read and map.

        Raises:
            ModelError: a sequence holds a piece that the student has no embedding for. As a target
                such a piece is allowed: its mass is outside the student's vocabulary.
        """
        return [self._mapped(row) for row in self.source.read_rows(shard, rows)]

    def _mapped(self, row: CachedSequence) -> CachedSequence:
        input_ids_L = self.to_student(row.input_ids_L)
        unknown_L = input_ids_L >= self.size
        if unknown_L.any():
            piece = self.name(int(row.input_ids_L[int(unknown_L.argmax())]))
            raise ModelError(
                f"row {row.sample_id} of the cache holds {piece!r}, which is no piece of the "
                "student's tokenizer",
                expected="every piece of the sequences in the student's vocabulary",
                do="choose a student that has it, or make the cache from text without it",
            )
        row = replace(row, input_ids_L=input_ids_L, targets=self._targets(row.targets))
        if isinstance(row, MixedSequence) and row.others:
            others = tuple((teacher, self._targets(targets)) for teacher, targets in row.others)
            return replace(row, others=others)
        return row

    def _targets(self, targets: SparseTargets) -> SparseTargets:
        largest_N = targets.largest_N
        return replace(
            targets,
            token_ids_E=self.to_student(targets.token_ids_E),
            largest_N=None
            if largest_N is None
            else np.where(largest_N < 0, -1, self.to_student(largest_N)),
        )
