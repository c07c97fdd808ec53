"""The training rows that meet a condition on what the cache knows of them; no entry is decoded.

Which rows these are depends on the cache and the condition alone, so the order of the batches is
arithmetic as before, of fewer rows. Held-out rows are never filtered.

Shapes: R rows of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.reader import Cache
from pipeline.cache.io.row_statistics import ROW_STATISTICS, row_statistics
from pipeline.data.expression import parse_expression
from pipeline.data.source import RowSource, RowsOver
from pipeline.errors import ConfigError

__all__ = ["FILTER_FILE", "FilterCounts", "FilteredRows", "filter_rows"]

FILTER_FILE = "filter.json"
"""In a run's folder: the counts by tag."""


@dataclass(frozen=True, slots=True)
class FilterCounts:
    """What a condition keeps of the training rows."""

    rows: int
    kept_rows: int
    loss_tokens: int
    kept_loss_tokens: int

    @property
    def token_share(self) -> float:
        """Of the supervised tokens, the part that is kept."""
        return self.kept_loss_tokens / max(self.loss_tokens, 1)

    def text(self) -> str:
        """Return the counts in words."""
        return (
            f"{self.kept_rows} of {self.rows} training rows, {100 * self.token_share:.1f} % of "
            "their supervised tokens"
        )


@dataclass(frozen=True)
class FilteredRows(RowsOver):
    """A `RowSource` of some rows of another one."""

    kept: tuple[NDArray[np.int32], ...]
    """For each shard the numbers of its rows that are kept, ascending."""

    def shard_rows(self) -> Sequence[int]:
        """Return the number of kept rows of each shard."""
        return [len(kept_R) for kept_R in self.kept]

    def shard_sizes(self, shard: int) -> NDArray[np.int32]:
        """Return tokens and supervised tokens of every kept row of a shard, [R, 2]."""
        return self.source.shard_sizes(shard)[self.kept[shard]]

    def read_rows(self, shard: int, rows: Sequence[int]) -> list[CachedSequence]:
        """Decode kept rows of one shard, in the order asked for.

        Raises:
            ShardDamaged: the shard is missing or damaged.
        """
        return self.source.read_rows(shard, self.kept[shard][list(rows)].tolist())


def filter_rows(
    source: RowSource, cache: Cache, text: str, *, name: str = ""
) -> tuple[FilteredRows, FilterCounts]:
    """Return the training rows that meet a condition, and how many they are.

    Args:
        source: the training rows of the cache, in its shards.
        cache: a single one, whose statistics are asked.
        text: the condition, on `ROW_STATISTICS`.
        name: of the cache, in messages.

    Raises:
        ConfigError: no row meets it.
        CacheError: a shard is missing or damaged.
    """
    condition = parse_expression(text, tuple(ROW_STATISTICS))
    values = row_statistics(cache, "train", condition.names)
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = {key: column.astype(np.float64) for key, column in values.items()}
        met = np.asarray(condition(exact))
    bounds = np.cumsum([0, *source.shard_rows()])
    kept = tuple(
        np.flatnonzero(met[start:stop]).astype(np.int32)
        for start, stop in pairwise(bounds.tolist())
    )
    sizes_R2 = [source.shard_sizes(shard) for shard in range(len(kept))]
    counts = FilterCounts(
        rows=int(bounds[-1]),
        kept_rows=sum(map(len, kept)),
        loss_tokens=sum(int(sizes[:, 1].sum()) for sizes in sizes_R2),
        kept_loss_tokens=sum(
            int(sizes[rows, 1].sum()) for sizes, rows in zip(sizes_R2, kept, strict=True)
        ),
    )
    if not counts.kept_loss_tokens:
        ranges = ", ".join(
            f"{key} from {column.min():.4g} to {column.max():.4g}"
            for key, column in values.items()
            if len(column)
        )
        raise ConfigError(
            f"data.filter: {text} leaves nothing{f' of {name}' if name else ''}",
            expected=f"a condition that some training rows meet, which have {ranges}",
            do="loosen it",
        )
    return FilteredRows(source, kept), counts
