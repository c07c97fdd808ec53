"""What the stream needs of a cache: the sizes of rows for planning, rows for batches.

Shapes: R rows of a shard.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.targets import CachedSequence

__all__ = ["RowSource", "RowsOver", "SizeSource"]


class SizeSource(Protocol):
    """What planning needs of rows."""

    def shard_sizes(self, shard: int) -> NDArray[np.int32]:
        """Return tokens and supervised tokens of every row of a shard, [R, 2]."""
        ...


class RowSource(Protocol):
    """Rows in shards; satisfied by `pipeline.cache.io.reader.SplitSource`.

    The stream reads scattered rows of several shards for every step and opens the next ones ahead;
    with `keep` it says which it still needs.
    """

    def shard_rows(self) -> Sequence[int]:
        """Return the number of rows of each shard, by index."""
        ...

    def shard_sizes(self, shard: int) -> NDArray[np.int32]:
        """Return tokens and supervised tokens of every row of a shard, [R, 2].

        Cheap, and asked for again and again: a view of memory or of a mapped file.
        """
        ...

    def shard_name(self, shard: int) -> str:
        """Return the name of a shard in the cache."""
        ...

    def open(self, shard: int) -> None:
        """Read a shard so that its rows are at hand; called from other threads."""
        ...

    def keep(self, shards: Collection[int]) -> None:
        """Keep these shards at hand once they are read, and let go of all others."""
        ...

    def reading(self) -> Sequence[str]:
        """Return what is being read at this moment, for people."""
        ...

    def read_rows(self, shard: int, rows: Sequence[int]) -> list[CachedSequence]:
        """Decode rows of one shard, in the order asked for.

        Raises:
            ShardDamaged: the shard is missing or damaged.
        """
        ...


@dataclass(frozen=True)
class RowsOver:
    """The part of a `RowSource` that is another one's: the same shards, rows of another form."""

    source: RowSource

    def shard_rows(self) -> Sequence[int]:
        """Return the source's."""
        return self.source.shard_rows()

    def shard_name(self, shard: int) -> str:
        """Return the source's."""
        return self.source.shard_name(shard)

    def open(self, shard: int) -> None:
        """Let the source read a shard."""
        self.source.open(shard)

    def keep(self, shards: Collection[int]) -> None:
        """Let the source keep shards."""
        self.source.keep(shards)

    def reading(self) -> Sequence[str]:
        """Return the source's."""
        return self.source.reading()
