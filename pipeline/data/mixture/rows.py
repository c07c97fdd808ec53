"""Rows of several caches as one `RowSource`: one after the other, or several teachers of one row.

Shapes: C caches, R rows of a shard.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.targets import CachedSequence, SparseTargets
from pipeline.data.settings import Teachers
from pipeline.data.source import RowSource, RowsOver
from pipeline.errors import CacheError

__all__ = [
    "MixedPart",
    "MixedRows",
    "MixedSequence",
    "SharedRows",
    "mixture_of",
    "teacher_of_row",
]


@dataclass(frozen=True, slots=True)
class MixedSequence(CachedSequence):
    """A row of a mixture: whose it is, and what its other teachers say of the same positions."""

    teacher: int = 0
    """The number of the cache that `targets` are of."""
    others: tuple[tuple[int, SparseTargets], ...] = ()
    """Further caches and their targets of the same N positions."""
    weights: tuple[float, ...] = (1.0,)
    """Of `targets` and then of `others`; their sum is 1."""

    def all_targets(self) -> list[tuple[int, float, SparseTargets]]:
        """Return the number of the cache, the weight and the targets of each teacher."""
        pairs = [(self.teacher, self.targets), *self.others]
        return [(c, w, t) for (c, t), w in zip(pairs, self.weights, strict=True)]


class MixedPart(NamedTuple):
    """One cache of a mixture."""

    tag: str
    weight: float
    source: RowSource


@dataclass(frozen=True)
class MixedRows:
    """The shards of all caches, one cache after the other; a `RowSource`.

    A row's `sample_id` gets the tag in front, `TAG:ID`: two caches may hold the same sample.
    """

    parts: tuple[MixedPart, ...]
    first_C: tuple[int, ...] = field(init=False)
    """The first shard of each cache, and the number of shards."""

    def __post_init__(self) -> None:
        """Count the shards."""
        counts = [len(part.source.shard_rows()) for part in self.parts]
        object.__setattr__(self, "first_C", tuple(accumulate(counts, initial=0)))

    def place(self, shard: int) -> tuple[int, int]:
        """Return the number of the cache that has a shard, and the shard's number there."""
        cache = bisect_right(self.first_C, shard) - 1
        return cache, shard - self.first_C[cache]

    def shard_rows(self) -> Sequence[int]:
        """Return the number of rows of each shard, by index."""
        return [rows for part in self.parts for rows in part.source.shard_rows()]

    def shard_sizes(self, shard: int) -> NDArray[np.int32]:
        """Return tokens and supervised tokens of every row of a shard, [R, 2]."""
        cache, local = self.place(shard)
        return self.parts[cache].source.shard_sizes(local)

    def shard_name(self, shard: int) -> str:
        """Return the tag and the name in its cache."""
        cache, local = self.place(shard)
        return f"{self.parts[cache].tag}/{self.parts[cache].source.shard_name(local)}"

    def open(self, shard: int) -> None:
        """Let its cache read a shard."""
        cache, local = self.place(shard)
        self.parts[cache].source.open(local)

    def keep(self, shards: Collection[int]) -> None:
        """Let each cache keep its own."""
        places = [self.place(shard) for shard in shards]
        for number, part in enumerate(self.parts):
            part.source.keep([local for cache, local in places if cache == number])

    def reading(self) -> Sequence[str]:
        """Return what is being read, of all caches."""
        return [name for part in self.parts for name in part.source.reading()]

    def read_rows(self, shard: int, rows: Sequence[int]) -> list[CachedSequence]:
        """Decode rows of one shard, in the order asked for.

        Raises:
            ShardDamaged: the shard is missing or damaged.
        """
        cache, local = self.place(shard)
        part = self.parts[cache]
        return [_of_cache(row, cache, part.tag) for row in part.source.read_rows(local, rows)]


@dataclass(frozen=True)
class SharedRows(RowsOver):
    """Caches of the same rows: each row once, with the mean of its teachers or with one of them.

    Which one is decided by the row's identity alone, in proportion to the weights.
    """

    parts: tuple[MixedPart, ...] = ()
    teachers: Teachers = "mean"

    def shard_sizes(self, shard: int) -> NDArray[np.int32]:
        """Return the first cache's: they are equal."""
        return self.source.shard_sizes(shard)

    def open(self, shard: int) -> None:
        """Let all caches read a shard."""
        for part in self.parts:
            part.source.open(shard)

    def keep(self, shards: Collection[int]) -> None:
        """Let all caches keep shards."""
        for part in self.parts:
            part.source.keep(shards)

    def reading(self) -> Sequence[str]:
        """Return what is being read, of all caches."""
        return [name for part in self.parts for name in part.source.reading()]

    def read_rows(self, shard: int, rows: Sequence[int]) -> list[CachedSequence]:
        """Decode rows of one shard, in the order asked for.

        Raises:
            CacheError: the caches hold different text under one identity.
            ShardDamaged: the shard of a cache is missing or damaged.
        """
        of_part = [part.source.read_rows(shard, rows) for part in self.parts]
        return [self._joined(taught) for taught in zip(*of_part, strict=True)]

    def _joined(self, taught: tuple[CachedSequence, ...]) -> CachedSequence:
        first = taught[0]
        for part, row in zip(self.parts, taught, strict=True):
            if row.sample_id != first.sample_id or not (
                np.array_equal(row.input_ids_L, first.input_ids_L)
                and np.array_equal(row.loss_mask_L, first.loss_mask_L)
            ):
                raise CacheError(
                    f"{part.tag}: row {row.sample_id} is not the row {first.sample_id} of "
                    f"{self.parts[0].tag}",
                    expected=f"the same rows in all caches under data.teachers {self.teachers}",
                    do="make the caches from one prepared corpus (--corpus.prepared), or train "
                    "with data.teachers each",
                )
        weights = [part.weight for part in self.parts]
        if self.teachers == "one":
            chosen = teacher_of_row(first.sample_id, weights)
            return _of_cache(taught[chosen], chosen, "")
        total = sum(weights)
        whole = _of_cache(first, 0, "")
        return replace(
            whole,
            others=tuple((number, row.targets) for number, row in enumerate(taught) if number),
            weights=tuple(weight / total for weight in weights),
        )


def teacher_of_row(sample_id: str, weights_C: Sequence[float]) -> int:
    """Return which cache teaches a row, by the first 12 digits of its identity, a hash."""
    place = int(sample_id[:12], 16) / 16**12 * sum(weights_C)
    return min(bisect_right(list(accumulate(weights_C)), place), len(weights_C) - 1)


def mixture_of(source: RowSource) -> MixedRows | None:
    """Return the mixture below a source; None where all rows are of one cache."""
    while isinstance(source, RowsOver):
        source = source.source
    return source if isinstance(source, MixedRows) else None


def _of_cache(row: CachedSequence, cache: int, tag: str) -> MixedSequence:
    return MixedSequence(
        sample_id=f"{tag}:{row.sample_id}" if tag else row.sample_id,
        input_ids_L=row.input_ids_L,
        loss_mask_L=row.loss_mask_L,
        targets=row.targets,
        teacher=cache,
    )
