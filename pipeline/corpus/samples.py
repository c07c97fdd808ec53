"""Units of a source to blocks of samples: read, render, tokenise, limit their length, identify."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.corpus.chat.conversation import Conversation
from pipeline.corpus.chat.rendering.render import ChatRenderer, Rendered
from pipeline.corpus.chat.rendering.tokenise import Tokens
from pipeline.corpus.intake import AcceptedRow, Intake
from pipeline.corpus.prepared.blocks import TokenisedRow
from pipeline.corpus.prepared.heldout import smallest_hashes
from pipeline.corpus.prepared.summary import BlockSummary, HashedRow, UnitSummary
from pipeline.corpus.prepared.units import Unit
from pipeline.corpus.sources.rows import Row
from pipeline.corpus.split import sample_id

__all__ = ["Block", "SampleIntake", "add_row", "hashed_row", "prepare_unit"]

_BLOCK_TOKENS = 8 << 20
"""Of one file at most, so that a unit that cannot be divided (a large compressed file) still needs
little memory, of the process that prepares it and of those that read it."""


@dataclass(slots=True)
class Block:
    """Samples that share a file, on their way there."""

    summary: BlockSummary
    train: list[TokenisedRow] = field(default_factory=list)
    candidates: list[TokenisedRow] = field(default_factory=list)


@dataclass(slots=True)
class SampleIntake(Intake):
    """Reads units for their samples."""

    def used(self, conversation: Conversation) -> Conversation:
        """Return all of it."""
        return conversation

    def described(self, conversation: Conversation) -> list[Any]:
        """Return everything that decides its tokens."""
        chat = conversation
        return [
            chat.messages, chat.first_supervised, chat.tools, sorted(chat.developer),
            sorted(chat.unsupervised), chat.unfinished, chat.answer_prefix,
        ]  # fmt: skip

    def rendered(self, renderer: ChatRenderer, conversation: Conversation, row: Row) -> Rendered:
        """Render it with its answers."""
        return renderer.render(conversation, row.place)

    def identity(self) -> dict[str, Any]:
        """Return what determines the samples."""
        # Not `super()`: a dataclass with slots is another class than the one its methods know.
        names = ("loss_on", "add_eos", "supervise_empty")
        return Intake.identity(self) | {name: getattr(self.settings, name) for name in names}

    def samples_of(self, taken: AcceptedRow) -> list[TokenisedRow]:
        """Return the sequences of a row that have a supervised token."""
        found = []
        for part, piece in self._cut(taken.tokens):
            loss_mask = piece.loss_mask.copy()
            loss_mask[:1] = False
            if not loss_mask.any():
                self.count("dropped_no_labels")
                continue
            name = sample_id(self.reading.source.name, taken.row.key, part)
            found.append(TokenisedRow(name, taken.index, part, piece.input_ids, loss_mask))
        return found

    def _cut(self, tokens: Tokens) -> Iterator[tuple[int, Tokens]]:
        limit, length = self.settings.longest, len(tokens.input_ids)
        if length <= limit:
            yield 0, tokens
        elif self.settings.overlong == "drop":
            self.count("dropped_overlong")
        elif self.settings.overlong == "truncate":
            self.count("truncated_rows")
            self.count("truncated_tokens", length - limit)
            yield 0, Tokens(tokens.input_ids[:limit], tokens.loss_mask[:limit])
        else:
            self.count("split_rows")
            for part, start in enumerate(range(0, length, limit)):
                self.count("split_parts")
                piece = slice(start, start + limit)
                yield part, Tokens(tokens.input_ids[piece], tokens.loss_mask[piece])


def prepare_unit(
    intake: Intake,
    unit: Unit,
    *,
    write: Callable[[int, Block], None],
    is_last: bool = True,
) -> UnitSummary:
    """Read a unit and hand on its blocks; a pure function of the source and the settings.

    Args:
        intake: of this corpus.
        unit: what to read.
        write: is called with each block's number and the block, which it may complete with the
            checksums of its files.
        is_last: whether no unit follows, for the message of a run that refuses bad rows.

    Raises:
        CorpusError: the source cannot be read, or has bad rows and the run refuses them.
    """
    intake.begin()
    blocks: list[Block] = []
    block = Block(BlockSummary(0))

    def finish() -> None:
        write(len(blocks), block)
        block.train, block.candidates = [], []
        blocks.append(block)

    for batch in intake.reading.batches(unit):
        if block.summary.num_tokens >= _BLOCK_TOKENS:
            finish()
            block = Block(BlockSummary(intake.report.rows))
        for taken in intake.take(batch):
            samples = intake.samples_of(taken)
            if samples:
                add_row(block, intake, taken, samples)
    finish()
    report = intake.end()
    if report.bad.count and intake.settings.on_bad_row == "refuse":
        raise report.bad.refusal(intake.settings, so_far=not is_last)
    return UnitSummary(unit.index, report, [block.summary for block in blocks])


def add_row(block: Block, intake: Intake, taken: AcceptedRow, samples: list[TokenisedRow]) -> None:
    """Put a row's samples into a block, among those that may be held out or the others."""
    summary = block.summary
    summary.rows += 1
    row = hashed_row(taken.hash, taken.index, samples)
    if intake.rule.is_candidate(taken.hash):
        summary.candidates.append(row)
        block.candidates += samples
    else:
        summary.train.add(row.totals)
        block.train += samples
        if not intake.rule.is_off:
            smallest_hashes(summary.smallest, row)


def hashed_row(row_hash: int, row: int, samples: Sequence[TokenisedRow]) -> HashedRow:
    """Return row `row` of a unit with the sums over its samples."""
    return HashedRow(
        row_hash,
        row,
        len(samples),
        sum(int(sample.input_ids.size) for sample in samples),
        sum(int(sample.loss_mask.sum()) for sample in samples),
    )
