"""Held-out rows in file order, as batches for evaluation; each rank has a contiguous part."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.data.collate import Batch, collate
from pipeline.data.source import RowSource

__all__ = ["RowRange", "heldout_batch", "heldout_parts"]


class RowRange(NamedTuple):
    """Rows of one shard that follow each other."""

    shard: int
    start: int
    stop: int


def heldout_batch(source: RowSource, parts: list[RowRange], *, temperature: float) -> Batch:
    """Read and join the rows of one batch."""
    sequences = [
        sequence
        for part in parts
        for sequence in source.read_rows(part.shard, range(part.start, part.stop))
    ]
    return collate(sequences, temperature=temperature)


def heldout_parts(
    source: RowSource, tokens_per_batch: int, *, rank: int, world_size: int
) -> list[list[RowRange]]:
    """Return the rows of each batch of a rank.

    Batches do not depend on the number of ranks; a rank takes those from one place to another, so
    that it reads its share of the shards. All ranks have equally many: those that run out have
    empty ones (N = 0), because a sharded model needs all ranks.
    """
    bounds = _plan(source, tokens_per_batch)
    starts = np.cumsum([0, *source.shard_rows()]).tolist()
    batches = len(bounds) - 1
    first, stop = batches * rank // world_size, batches * (rank + 1) // world_size
    mine = [_ranges(starts, bounds[i], bounds[i + 1]) for i in range(first, stop)]
    return mine + [[] for _ in range(-(-batches // world_size) - len(mine))]


def _ranges(starts: list[int], first: int, stop: int) -> list[RowRange]:
    """Return rows `first` to `stop` of the split by shard."""
    ranges = []
    shard = int(np.searchsorted(starts, first, side="right")) - 1
    while shard < len(starts) - 1 and starts[shard] < stop:
        low, high = max(first, starts[shard]), min(stop, starts[shard + 1])
        if low < high:
            ranges.append(RowRange(shard, low - starts[shard], high - starts[shard]))
        shard += 1
    return ranges


def _plan(source: RowSource, tokens_per_batch: int) -> list[int]:
    """Return at which row of the split each batch starts, and the number of rows."""
    bounds: list[int] = []
    room = row = 0
    for shard in range(len(source.shard_rows())):
        for length in source.shard_sizes(shard)[:, 0].tolist():
            if not bounds or length > room:
                bounds.append(row)
                room = tokens_per_batch
            room -= length
            row += 1
    return [*bounds, row]
