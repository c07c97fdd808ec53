"""The held-out batches of a rank, read and decoded in the background while others are scored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from pipeline.data.collate import Batch
from pipeline.data.heldout import heldout_batch, heldout_parts
from pipeline.data.source import RowSource
from pipeline.data.stream.prefetch import Prefetcher
from pipeline.data.stream.read_ahead import ReadAhead

__all__ = ["heldout_stream"]

_BATCHES_AHEAD = 4
_SHARDS_AHEAD = 8
"""Half of what a source keeps: a shard that is read too early would be gone when it is needed."""


@contextmanager
def heldout_stream(
    source: RowSource, *, tokens_per_batch: int, temperature: float, rank: int, world_size: int
) -> Iterator[Iterator[Batch]]:
    """Give the batches of `heldout_parts`; one thread makes them ahead, one opens shards.

    Args:
        source: the held-out rows.
        tokens_per_batch: most tokens of a batch; a longer row is a batch of its own.
        temperature: one of the cache's grid.
        rank: this rank.
        world_size: ranks that share the rows.
    """
    batches = heldout_parts(source, tokens_per_batch, rank=rank, world_size=world_size)
    shards = list(dict.fromkeys(part.shard for parts in batches for part in parts))

    def made() -> Iterator[Batch]:
        left = list(shards)
        for parts in batches:
            while parts and left[0] != parts[0].shard:
                left.pop(0)
            ahead.want(left[:_SHARDS_AHEAD])
            yield heldout_batch(source, parts, temperature=temperature)

    with (
        closing(ReadAhead(source.open, threads=1)) as ahead,
        Prefetcher(made(), ahead=_BATCHES_AHEAD) as stream,
    ):
        yield stream
