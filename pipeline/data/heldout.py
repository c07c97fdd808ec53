"""Held-out rows in file order, as batches for evaluation, dealt to ranks in turn."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.data.collate import Batch, collate
from pipeline.data.source import RowSource

__all__ = ["heldout_batches"]


def heldout_batches(
    source: RowSource,
    *,
    tokens_per_batch: int,
    temperature: float,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield every row exactly once over all ranks.

    Batches do not depend on the number of ranks; a rank takes every `world_size`-th. All ranks
    yield equally many: those that run out yield empty batches (N = 0), because a sharded model
    needs all of them.

    Args:
        source: the held-out rows.
        tokens_per_batch: most tokens of a batch; a longer row is a batch of its own.
        temperature: one of the cache's grid.
        rank: this rank.
        world_size: ranks that share the rows.
    """
    plan = _plan(source, tokens_per_batch)
    for first in range(0, len(plan), world_size):
        mine = plan[first + rank] if first + rank < len(plan) else []
        sequences = [
            sequence
            for shard in dict.fromkeys(shard for shard, _ in mine)
            for sequence in source.read_rows(shard, [row for s, row in mine if s == shard])
        ]
        yield collate(sequences, temperature=temperature)


def _plan(source: RowSource, tokens_per_batch: int) -> list[list[tuple[int, int]]]:
    """Return (shard, row) of each batch."""
    places = [(shard, row) for shard, rows in enumerate(source.shard_rows()) for row in range(rows)]
    batches: list[list[tuple[int, int]]] = []
    room = 0
    for place, length in zip(places, source.lengths().tolist(), strict=True):
        if not batches or length > room:
            batches.append([])
            room = tokens_per_batch
        batches[-1].append(place)
        room -= length
    return batches
