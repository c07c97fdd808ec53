"""What the stream needs of a cache: row lengths for planning, rows for batches.

Shapes: R rows of all shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.targets import CachedSequence

__all__ = ["RowSource", "RowsOver"]


class RowSource(Protocol):
    """Rows in shards; satisfied by `pipeline.cache.io.reader.SplitSource`.

    The stream reads scattered rows of up to `shuffle_shards` shards for every step, and opens as
    many again ahead: a source should keep twice that many shards at hand.
    """

    def shard_rows(self) -> Sequence[int]:
        """Return the number of rows of each shard, in the manifest's order."""
        ...

    def lengths(self) -> NDArray[np.int32]:
        """Return the tokens of every row [R], shard after shard."""
        ...

    def loss_token_counts(self) -> NDArray[np.int32]:
        """Return the supervised tokens of every row [R], shard after shard."""
        ...

    def shard_name(self, shard: int) -> str:
        """Return the name of a shard in the cache."""
        ...

    def open(self, shard: int) -> None:
        """Read a shard so that its rows are at hand; called from other threads."""
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

    def reading(self) -> Sequence[str]:
        """Return the source's."""
        return self.source.reading()
