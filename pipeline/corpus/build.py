"""Build a whole corpus in this process: for small ones, and for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.corpus.conclusion import conclude_samples
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.intake import Intake, TeacherTokens
from pipeline.corpus.prepared.heldout import Splitting
from pipeline.corpus.prepared.summary import CorpusSummary, SampleTotals, UnitReport
from pipeline.corpus.reading import open_reading
from pipeline.corpus.samples import Block, SampleIntake, prepare_unit
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.table import SampleTable, SampleWriter

__all__ = ["Progress", "build_corpus", "read_whole"]

Progress = Callable[[int, int | None], None]
"""Called with the rows done and, if known beforehand, the number of all rows."""


def build_corpus(
    settings: CorpusSettings,
    *,
    tokenizer: Any,
    seed: int,
    teacher: TeacherTokens | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Read, render and tokenise the corpus that `settings` describe.

    Args:
        settings: the corpus section of the configuration.
        tokenizer: a fast tokenizer of transformers.
        seed: decides, with each row's identity, which rows are held out.
        teacher: its end tokens and the size of its embedding, where they are known.
        progress: called after each batch of rows.

    Raises:
        CorpusError: the corpus cannot be reached or read, is empty, fits no format, or has more
            bad rows than the settings allow.
    """
    reading = open_reading(settings)
    intake = SampleIntake(
        settings, tokenizer, reading, seed, teacher or TeacherTokens(), settings.add_eos
    )
    samples, found = read_whole(intake, progress)
    return Corpus(samples, conclude_samples(found, intake), intake.identity(), found.report.content)


def read_whole(
    intake: Intake, progress: Progress | None = None
) -> tuple[SampleTable, CorpusSummary]:
    """Read all units of a source; return the samples, and what the units say together.

    Raises:
        CorpusError: the source cannot be read, or has bad rows and the run refuses them.
    """
    units = intake.reading.units(intake.settings)
    known = [unit.rows for unit in units]
    total = None if None in known else sum(rows or 0 for rows in known)
    splitting, report, gathered = Splitting(intake.rule), UnitReport(), _Gathered()
    for unit in units:
        before = report.rows

        def write(_number: int, block: Block, before: int = before) -> None:
            gathered.add(block, splitting, before)

        def on_rows(rows: int, before: int = before) -> None:
            if progress is not None:
                progress(before + rows, total)

        summary = prepare_unit(
            intake, unit, write=write, on_rows=on_rows, is_last=unit is units[-1]
        )
        report.add(summary.report)
    samples = gathered.finish(splitting)
    heldout_rows = splitting.heldout + gathered.moved
    found = CorpusSummary(
        report, splitting.rows, heldout_rows, gathered.moved, gathered.train, gathered.heldout
    )
    return samples, found


class _Gathered:
    """The samples of all blocks, in source order, each with its split."""

    def __init__(self) -> None:
        self._writer = SampleWriter()
        self._rows: list[int] = []
        """Rows of the source before each block."""
        self.moved = 0
        self.train, self.heldout = SampleTotals(), SampleTotals()

    def add(self, block: Block, splitting: Splitting, before: int) -> None:
        held = splitting.add(block.summary).heldout
        self._rows.append(before)
        for row in sorted([*block.train, *block.candidates], key=lambda row: (row.row, row.part)):
            self._writer.append(row.sample("heldout" if row.row in held else "train", before))

    def finish(self, splitting: Splitting) -> SampleTable:
        moved = {
            self._rows[block] + row.row for block, rows in splitting.moved().items() for row in rows
        }
        self.moved = len(moved)
        table = self._writer.finish()
        if moved:
            table = table.with_heldout(moved)
        for split, totals in (("train", self.train), ("heldout", self.heldout)):
            chosen = table.of_split(split)
            totals.add(SampleTotals(len(chosen), chosen.num_tokens, chosen.num_loss_tokens))
        return table
