"""A prepared corpus as far as it is known: the blocks of its first units, in order, with splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Lock

from pipeline.corpus.prepared.blocks import TokenisedRow
from pipeline.corpus.prepared.folder import DamagedBlock, PreparedFolder
from pipeline.corpus.prepared.heldout import BlockSplit, Splitting
from pipeline.corpus.prepared.summary import (
    BlockSummary,
    CorpusSummary,
    SampleTotals,
    UnitReport,
    UnitSummary,
)
from pipeline.corpus.prepared.units import Unit
from pipeline.corpus.sample import Sample, SplitName
from pipeline.corpus.split import SplitRule
from pipeline.errors import CorpusError

__all__ = ["CorpusView", "PlacedBlock"]


@dataclass(frozen=True, slots=True)
class PlacedBlock:
    """A block whose split is decided."""

    unit: int
    number: int
    """Among the blocks of its unit."""
    first_row: int
    """Rows of the source before its unit."""
    checksums: tuple[str, ...]
    split: BlockSplit


@dataclass(slots=True)
class CorpusView:
    """What is known of a prepared corpus; grows with `refresh` until it is complete.

    Units count in their order: one that is done while an earlier one is not waits. So everything
    here is a function of the corpus and of how far it is known, whoever looks.
    """

    folder: PreparedFolder
    units: Sequence[Unit]
    rule: SplitRule
    prepare: Callable[[Unit], object]
    """Prepares a unit again whose files are damaged; to the same bytes."""
    report: UnitReport = field(default_factory=UnitReport)
    """Of the units so far."""
    blocks: list[PlacedBlock] = field(default_factory=list)
    """Of the units so far; those of a corpus that may turn out to be small come at its end."""
    num_done: int = 0
    """Units so far."""
    train: SampleTotals = field(default_factory=SampleTotals)
    heldout: SampleTotals = field(default_factory=SampleTotals)
    moved_rows: int = 0
    _splitting: Splitting = field(init=False)
    _waiting: dict[int, UnitSummary] = field(default_factory=dict)
    """Done, but after a unit that is not."""
    _unsettled: list[tuple[PlacedBlock, BlockSummary]] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)
    _placed: int = 0
    _repairing: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        """Begin with nothing."""
        self._splitting = Splitting(self.rule)

    @property
    def is_complete(self) -> bool:
        """Whether every unit is known, and with them the split of all rows."""
        return self.num_done == len(self.units)

    @property
    def known_share(self) -> float:
        """The share of the source that is known, by bytes: 1 where it is complete."""
        total = sum(unit.size for unit in self.units)
        known = sum(unit.size for unit in self.units[: self.num_done])
        return 1.0 if self.is_complete or not total else known / total

    def projected(self, *, only_heldout: bool = False) -> SampleTotals:
        """Return the sums over all (held-out) samples; projected by the bytes of the source."""
        share = self.known_share or 1.0
        known = SampleTotals()
        if not only_heldout:
            known.add(self.train)
        known.add(self.heldout)
        return SampleTotals(
            *(round(n / share) for n in (known.samples, known.tokens, known.loss_tokens))
        )

    def refresh(self) -> bool:
        """Look at the folder; return whether more is known than before.

        Raises:
            StoreError: the store fails.
        """
        if self.is_complete:
            return False
        _, names = self.folder.done()
        self._names &= set(names)
        for name, summaries in self.folder.read([n for n in names if n not in self._names]):
            if summaries:
                self._names.add(name)
            self._waiting |= {s.index: s for s in summaries if s.index >= self.num_done}
        before = self.num_done
        while self.num_done in self._waiting:
            self._add(self._waiting.pop(self.num_done))
            self.num_done += 1
        if self.num_done > before:
            self._settle()
        return self.num_done > before

    def summary(self) -> CorpusSummary:
        """Return what the units say together; of a complete corpus."""
        assert self.is_complete
        heldout_rows = self._splitting.heldout + self.moved_rows
        return CorpusSummary(
            self.report, self._splitting.rows, heldout_rows, self.moved_rows, self.train,
            self.heldout,
        )  # fmt: skip

    def samples(self, block: PlacedBlock, split: SplitName) -> list[Sample]:
        """Read the samples of a block that are of a split, in the order of the source.

        Raises:
            CorpusError: its files are damaged, and the source gives other text than before.
        """
        held = split == "heldout"
        train = not held or block.split.moves
        candidates = held or block.split.releases
        try:
            rows = self._read(block, train=train, candidates=candidates)
        except DamagedBlock:
            try:
                rows = self._repaired(block, train=train, candidates=candidates)
            except DamagedBlock as error:
                raise CorpusError(
                    f"{error.found}, and preparing it again gave other samples",
                    expected="the source as it was when the corpus was prepared",
                    do="bring the source back, or delete the prepared corpus and the cache",
                ) from error
        heldout = block.split.heldout
        return [row.sample(split, block.first_row) for row in rows if (row.row in heldout) == held]

    def _read(self, block: PlacedBlock, *, train: bool, candidates: bool) -> list[TokenisedRow]:
        return self.folder.read_block(
            block.unit, block.number, block.checksums, train=train, candidates=candidates
        )

    def _repaired(self, block: PlacedBlock, *, train: bool, candidates: bool) -> list[TokenisedRow]:
        with self._repairing:
            with suppress(DamagedBlock):  # another thread may have repaired it meanwhile
                return self._read(block, train=train, candidates=candidates)
            self.prepare(self.units[block.unit])
            return self._read(block, train=train, candidates=candidates)

    def _add(self, summary: UnitSummary) -> None:
        for number, block in enumerate(summary.blocks):
            placed = PlacedBlock(
                summary.index, number, self.report.rows, tuple(block.checksums),
                self._splitting.add(block),
            )  # fmt: skip
            # Kept small: the candidates of all units would take gigabytes.
            kept = block if not self._splitting.is_settled else BlockSummary(0)
            self._unsettled.append((placed, kept))
        self.report.add(summary.report)

    def _settle(self) -> None:
        """Decide about the blocks that wait, where nothing that follows can change their split."""
        if not self._splitting.is_settled and not self.is_complete:
            return
        moved = {} if self._splitting.is_settled else self._splitting.moved()
        for placed, block in self._unsettled:
            rows = moved.get(self._placed, [])
            if rows:
                split = Splitting.with_moved(block, placed.split, rows)
                placed = replace(placed, split=split)
                self.moved_rows += len(rows)
            self._placed += 1
            self.train.add(placed.split.num_train)
            self.heldout.add(placed.split.num_heldout)
            self.blocks.append(placed)
        self._unsettled.clear()
