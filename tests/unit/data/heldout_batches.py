"""The held-out batches of a rank without threads: what the stream is compared with."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.data.collate import Batch
from pipeline.data.heldout import heldout_batch, heldout_parts
from pipeline.data.source import RowSource


def heldout_batches(
    source: RowSource,
    *,
    tokens_per_batch: int,
    temperature: float,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield the batches of a rank, one after another."""
    for parts in heldout_parts(source, tokens_per_batch, rank=rank, world_size=world_size):
        yield heldout_batch(source, parts, temperature=temperature)
