"""Which rows of prepared units are held out, found unit after unit in the order of the source."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.corpus.prepared.summary import BlockSummary, HashedRow, SampleTotals
from pipeline.corpus.split import AT_LEAST, SplitRule

__all__ = ["BlockSplit", "Splitting", "smallest_hashes"]


@dataclass(frozen=True, slots=True)
class BlockSplit:
    """The split of one block's rows."""

    heldout: frozenset[int]
    """Rows of the unit."""
    num_train: SampleTotals
    num_heldout: SampleTotals
    releases: bool
    """Whether candidates are trained on."""
    moves: bool
    """Whether rows that are no candidates are held out."""


@dataclass(slots=True)
class Splitting:
    """The split of the blocks so far, and whether what follows can change it."""

    rule: SplitRule
    rows: int = 0
    """Usable rows of the blocks so far."""
    candidates: int = 0
    heldout: int = 0
    """Candidates that are held out."""
    _blocks: int = 0
    _smallest: list[tuple[int, int, HashedRow]] = field(default_factory=list)
    """A heap of (minus the hash, minus the block, row) of rows that are no candidates."""

    @property
    def is_settled(self) -> bool:
        """Whether no row so far can be held out because the corpus turns out to be small."""
        return self.rule.is_off or self.heldout >= self.rule.least(1 << 62)

    def add(self, block: BlockSummary) -> BlockSplit:
        """Split the next block, as if the corpus were large enough."""
        held: list[HashedRow] = []
        for row in block.candidates:
            if self.rule.holds_out(row.hash, self.candidates):
                held.append(row)
            self.candidates += 1
        self.rows += block.rows
        self.heldout += len(held)
        for row in block.smallest:
            heapq.heappush(self._smallest, (-row.hash, -self._blocks, row))
            if len(self._smallest) > AT_LEAST:
                heapq.heappop(self._smallest)
        self._blocks += 1
        return _split(block, held, [])

    def moved(self) -> dict[int, list[HashedRow]]:
        """Return the rows that are held out though no candidates, by block; after the last one.

        It matters only for small corpora, where a share of 2 % may be no row at all. Such a row may
        return to the training part when more rows are read.
        """
        missing = max(0, self.rule.least(self.rows) - self.heldout)
        found: dict[int, list[HashedRow]] = {}
        for _, block, row in sorted(self._smallest, reverse=True)[:missing]:
            found.setdefault(-block, []).append(row)
        return found

    @staticmethod
    def with_moved(
        block: BlockSummary, split: BlockSplit, moved: Sequence[HashedRow]
    ) -> BlockSplit:
        """Return the split of a block with some more rows held out."""
        held = [row for row in block.candidates if row.row in split.heldout]
        return _split(block, held, moved)


def smallest_hashes(rows: list[HashedRow], row: HashedRow) -> None:
    """Add a row to the list of the few of smallest hashes, in its order."""
    if len(rows) < AT_LEAST or row < rows[-1]:
        rows.append(row)
        rows.sort()
        del rows[AT_LEAST:]


def _split(
    block: BlockSummary, held: Sequence[HashedRow], moved: Sequence[HashedRow]
) -> BlockSplit:
    train, heldout = SampleTotals(), SampleTotals()
    train.add(block.train)
    for row in block.candidates:
        train.add(row.totals)
    for row in (*held, *moved):
        train.take(row.totals)
        heldout.add(row.totals)
    return BlockSplit(
        heldout=frozenset(row.row for row in (*held, *moved)),
        num_train=train,
        num_heldout=heldout,
        releases=len(held) < len(block.candidates),
        moves=bool(moved),
    )
