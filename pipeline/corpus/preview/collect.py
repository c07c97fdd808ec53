"""From the first rows of a source to a preview: by the very reader of units that stage one has.

Rows go one by one through what a unit goes through (`Intake.take`, `samples_of`), so that tokens,
masks, names and faults are those of the cache. Nothing is written, and no more rows are read than
are shown or summed up.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.corpus.intake import AcceptedRow, Intake
from pipeline.corpus.prepared.blocks import TokenisedRow
from pipeline.corpus.prepared.heldout import Splitting
from pipeline.corpus.prepared.summary import BlockSummary, UnitReport
from pipeline.corpus.preview.choice import RowChoice
from pipeline.corpus.preview.detected import detected
from pipeline.corpus.preview.findings import findings_of
from pipeline.corpus.preview.pieces import PieceMaker
from pipeline.corpus.preview.record import Fact, Outcome, Part, Preview, RowView, Totals
from pipeline.corpus.preview.seen import Seen
from pipeline.corpus.prompts import PromptIntake
from pipeline.corpus.samples import Block, add_row
from pipeline.corpus.sources.rows import Row

__all__ = ["preview_corpus"]

_UNDIVIDED = 1 << 62


@dataclass(frozen=True, slots=True)
class _Read:
    """A row on its way into a preview; how it is divided into pieces is found last."""

    number: int
    row: Row
    outcome: Outcome
    reason: str
    taken: AcceptedRow | None
    samples: tuple[TokenisedRow, ...]


@dataclass(slots=True)
class _Kept:
    """The rows that are shown."""

    choice: RowChoice
    chosen: dict[int, _Read] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    longest: list[tuple[int, int]] = field(default_factory=list)
    """A heap of (tokens, minus the number)."""
    candidates: dict[int, _Read] = field(default_factory=dict)
    """Rows that may turn out to be held out, or the longest."""

    def add(self, read: _Read, report: UnitReport, *, may_be_heldout: bool) -> None:
        """Keep a row if it is to be shown, or may be."""
        kinds = {
            "truncated": bool(report.counts.get("truncated_rows")),
            "quarantined": read.outcome == "quarantined",
            "dropped": read.outcome == "dropped",
        }
        for kind, holds in kinds.items():
            if holds and self.found.get(kind, 0) < self.choice.kinds.get(kind, 0):
                self.found[kind] = self.found.get(kind, 0) + 1
                self.chosen[read.number] = read
        if read.number in self.choice.numbers:
            self.chosen[read.number] = read
        if may_be_heldout and "heldout" in self.choice.kinds:
            self.candidates[read.number] = read
        wanted = self.choice.kinds.get("longest", 0)
        if wanted and read.taken is not None:
            heapq.heappush(self.longest, (len(read.taken.tokens.input_ids), -read.number))
            self.candidates[read.number] = read
            if len(self.longest) > wanted:
                _, number = heapq.heappop(self.longest)
                if not may_be_heldout:
                    self.candidates.pop(-number, None)

    def rows(self, heldout: frozenset[int]) -> list[_Read]:
        """Return the rows to show, in the order of the source."""
        numbers = [-number for _, number in self.longest]
        first = sorted(number for number in self.candidates if number in heldout)
        numbers += first[: self.choice.kinds.get("heldout", 0)]
        for kind, count in (("longest", len(self.longest)), ("heldout", len(first))):
            self.found[kind] = count
        shown = self.chosen | {number: self.candidates[number] for number in numbers}
        return [shown[number] for number in sorted(shown)]

    @property
    def missing(self) -> tuple[str, ...]:
        """The kinds of which no row was found."""
        return tuple(kind for kind in self.choice.kinds if not self.found.get(kind))


def preview_corpus(
    intake: Intake, choice: RowChoice, *, sample_rows: int, facts: Sequence[Fact] = ()
) -> Preview:
    """Read the first rows and return what is to be shown of them.

    Args:
        intake: of the corpus, as stage one has it; it is used up.
        choice: the rows to show.
        sample_rows: how many of the first rows are summed up.
        facts: what the caller knows, to be shown first.

    Raises:
        CorpusError: the source cannot be read.
    """
    totals, seen, kept = Totals(), Seen(intake), _Kept(choice)
    block = Block(BlockSummary(0))
    last = max(sample_rows, choice.last)
    skipped = False
    number = -1
    rows = _rows(intake)
    for number, row in enumerate(itertools.islice(rows, last)):
        is_summed = number < sample_rows
        may_be_heldout = intake.rule.is_candidate(intake.rule.hash_of(row.key))
        if not is_summed and number not in choice.numbers and not may_be_heldout:
            skipped = True  # of no interest, and it decides about no other row
            continue
        read, report = _read(intake, seen, number, row, notice=is_summed)
        if read.taken is not None and read.samples:
            add_row(block, intake, replace(read.taken, index=number), list(read.samples))
        if is_summed:
            _add(totals, read, report)
        if is_summed or number in choice.numbers:
            kept.add(read, report, may_be_heldout=may_be_heldout or not intake.rule.is_off)
    totals.is_all = next(rows, None) is None
    totals.rows = min(number + 1, sample_rows)
    splitting = Splitting(intake.rule)
    split = splitting.add(block.summary)
    if totals.is_all and not skipped:
        split = splitting.with_moved(block.summary, split, splitting.moved().get(0, []))
    totals.is_settled = splitting.is_settled or (totals.is_all and not skipped)
    totals.heldout_rows = sum(row < sample_rows for row in split.heldout)
    maker = PieceMaker(intake.tokenizer)
    views = [_view(read, intake, maker, split.heldout) for read in kept.rows(split.heldout)]
    return Preview(
        name=intake.settings.dataset_name,
        longest=_longest(intake),
        is_prompts=isinstance(intake, PromptIntake),
        facts=(*facts, *detected(intake, seen)),
        totals=totals,
        findings=tuple(findings_of(intake, totals, seen)),
        rows=tuple(views),
        missing=kept.missing,
    )


def _rows(intake: Intake) -> Iterator[Row]:
    source = intake.reading.source
    rows = (row for piece in source.pieces(_UNDIVIDED) for row in source.read(piece))
    return itertools.islice(rows, intake.settings.num_samples)


def _longest(intake: Intake) -> int:
    return intake.limits.max_tokens if isinstance(intake, PromptIntake) else intake.settings.longest


def _read(
    intake: Intake, seen: Seen, number: int, row: Row, *, notice: bool
) -> tuple[_Read, UnitReport]:
    """Read a row as a unit of its own."""
    if notice:
        seen.interpreted(number, row)
    intake.begin()
    taken = next(iter(list(intake.take([row]))), None)
    samples = [] if taken is None else intake.samples_of(taken)
    report = intake.end()
    outcome: Outcome = "used" if samples else "quarantined" if report.bad.count else "dropped"
    reason = ""
    for kind, messages in report.bad.messages.items():
        reason = f"{kind}: {messages[0].error()}"
        if notice:
            seen.quarantined(number, kind, messages[0].found)
    if outcome == "dropped":
        limit = _longest(intake)
        if report.counts.get("dropped_overlong"):
            reason = f"longer than {limit} tokens, and corpus.overlong is drop"
        elif isinstance(intake, PromptIntake):
            reason = "nothing to answer"
        else:
            reason = "no supervised token"
    if notice and taken is not None:
        seen.taken(number, taken, samples)
    return _Read(number, row, outcome, reason, taken, tuple(samples)), report


def _add(totals: Totals, read: _Read, report: UnitReport) -> None:
    totals.used += read.outcome == "used"
    totals.samples += len(read.samples)
    totals.tokens += sum(int(sample.input_ids.size) for sample in read.samples)
    totals.loss_tokens += sum(int(sample.loss_mask.sum()) for sample in read.samples)
    totals.turns += report.turns
    totals.unended += report.unended
    for mine, others in (
        (totals.counts, report.counts),
        (totals.quarantined, report.bad.kinds),
        (totals.notes, report.notes),
    ):
        for name, count in others.items():
            mine[name] = mine.get(name, 0) + count
    if report.replaced:
        note = "texts are not valid Unicode: U+FFFD in place of it"
        totals.notes[note] = totals.notes.get(note, 0) + report.replaced
    if read.taken is not None:
        totals.lengths.append(len(read.taken.tokens.input_ids))


def _view(read: _Read, intake: Intake, maker: PieceMaker, heldout: frozenset[int]) -> RowView:
    return RowView(
        number=read.number,
        place=read.row.place,
        outcome=read.outcome,
        reason=read.reason,
        split="heldout" if read.number in heldout else "train",
        tokens=0 if read.taken is None else len(read.taken.tokens.input_ids),
        parts=tuple(_part(sample, read, intake, maker) for sample in read.samples),
    )


def _part(sample: TokenisedRow, read: _Read, intake: Intake, maker: PieceMaker) -> Part:
    assert read.taken is not None
    tokens = read.taken.tokens
    length = len(sample.input_ids)
    start = _start(sample, read.taken, intake)
    # The parts of a row that is split lose nothing to each other.
    is_split = intake.settings.overlong == "split" and not isinstance(intake, PromptIntake)
    before, after = (0, 0) if is_split else (start, len(tokens.input_ids) - start - length)
    assert np.array_equal(tokens.input_ids[start : start + length], sample.input_ids)
    lost = int(tokens.loss_mask.sum()) - int(tokens.loss_mask[start : start + length].sum())
    return Part(
        sample_id=sample.sample_id,
        number=sample.part,
        input_ids_L=sample.input_ids,
        loss_mask_L=sample.loss_mask,
        pieces=maker.pieces(sample.input_ids, sample.loss_mask),
        lost_before=before,
        lost_after=after,
        lost_supervised=0 if is_split else lost,
    )


def _start(sample: TokenisedRow, taken: AcceptedRow, intake: Intake) -> int:
    """Return where a sample begins among the tokens of its row."""
    if not isinstance(intake, PromptIntake):
        return sample.part * intake.settings.longest
    length = len(taken.tokens.input_ids)
    end = min(length, intake.limits.document_tokens) if taken.is_document else length
    return end - len(sample.input_ids)
