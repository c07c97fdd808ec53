"""Reading of rows: their text and tokens, and the report of what was left out.

The common part of samples (`samples.py`) and prompts (`prompts.py`).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.corpus.chat.conversation import Conversation, Document
from pipeline.corpus.chat.rendering.encoder import TextEncoder
from pipeline.corpus.chat.rendering.render import ChatRenderer, Rendered
from pipeline.corpus.chat.rendering.template import load_template
from pipeline.corpus.chat.rendering.tokenise import DocumentEnds, Tokens, document_ends, tokenise
from pipeline.corpus.prepared.blocks import TokenisedRow
from pipeline.corpus.prepared.summary import UnitReport
from pipeline.corpus.reading import Reading, reading_identity, with_system
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.sources.rows import BadRow, Row
from pipeline.corpus.split import HeldoutRule

__all__ = ["AcceptedRow", "Intake", "TeacherTokens"]


@dataclass(frozen=True, slots=True)
class AcceptedRow:
    """A row of the source with its tokens."""

    row: Row
    index: int
    """Its number within the unit, from 0."""
    hash: int
    """What decides whether it is held out."""
    is_document: bool
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class TeacherTokens:
    """What the corpus must know of the teacher besides its tokenizer."""

    end_tokens: tuple[int, ...] = ()
    """Ids that end generation, besides the tokenizer's EOS and the template's end of turn."""
    vocab_size: int | None = None
    """Rows of the teacher's embedding: no id may reach it; None: not checked."""


@dataclass(slots=True)
class Intake(ABC):
    """What reads the units of a source; a subclass chooses what of a conversation is used.

    One unit at a time: `begin`, then `take` for each batch of its rows, then `end`.
    """

    settings: CorpusSettings
    tokenizer: Any
    reading: Reading
    seed: int
    teacher: TeacherTokens
    add_eos: bool
    """After a document."""
    report: UnitReport = field(default_factory=UnitReport)
    """Of the unit that is being read."""
    rule: HeldoutRule = field(init=False)
    renderer: ChatRenderer | None = field(init=False)
    """None where the text is plain."""
    ends: DocumentEnds = field(init=False)
    _encoder: TextEncoder = field(init=False)
    _content: Any = field(init=False)

    def __post_init__(self) -> None:
        """Load the template; create the split rule and the special tokens of documents.

        Raises:
            CorpusError: there are chats, and no template that can render them.
        """
        chosen = self.settings
        self._encoder = TextEncoder(self.tokenizer)
        self.rule = HeldoutRule(
            self.seed, self.reading.source.name, chosen.heldout_fraction, chosen.heldout_samples
        )
        self.ends = document_ends(self.tokenizer, add_bos=chosen.add_bos, add_eos=self.add_eos)
        self.renderer = None if self.reading.format_name == "text" else self._new_renderer()
        self.begin()

    def begin(self) -> None:
        """Forget the unit before."""
        self.report = UnitReport()
        self._content = hashlib.blake2b(digest_size=16)
        self.reading.soundness.reset()

    def end(self) -> UnitReport:
        """Return the report of the unit."""
        report, soundness = self.report, self.reading.soundness
        report.content = self._content.hexdigest()
        report.replaced, report.notes = soundness.replaced, dict(soundness.notes)
        return report

    @abstractmethod
    def used(self, conversation: Conversation) -> Conversation:
        """Return the part of a conversation that is used."""

    @abstractmethod
    def described(self, conversation: Conversation) -> list[Any]:
        """Return what determines its tokens; the digest is part of the cache's identity."""

    @abstractmethod
    def rendered(self, renderer: ChatRenderer, conversation: Conversation, row: Row) -> Rendered:
        """Render it.

        Raises:
            BadRow: the template rejects it, or loses some of it.
        """

    @abstractmethod
    def samples_of(self, taken: AcceptedRow) -> list[TokenisedRow]:
        """Return what a row gives, none where it gives nothing; counts what is cut or left out."""

    def take(self, batch: list[Row]) -> Iterator[AcceptedRow]:
        """Yield the next rows of the unit that have tokens; count the others.

        Raises:
            CorpusError: the run refuses bad rows and has met enough of them.
        """
        report = self.report
        kept: list[tuple[Row, int]] = []
        texts: list[Rendered | str] = []
        for row in batch:
            index = report.rows
            report.rows += 1
            try:
                text = self._text(self.reading.interpret(row), row)
            except BadRow as bad:
                report.bad.add(bad, self.settings)
                continue
            if text is not None:
                kept.append((row, index))
                texts.append(text)
        done = tokenise(texts, encoder=self._encoder, ends=self.ends)
        for (row, index), text, tokens in zip(kept, texts, done, strict=True):
            foreign = self._foreign(row, tokens)
            if foreign is not None:
                report.bad.add(foreign, self.settings)
                continue
            if isinstance(text, Rendered):
                report.turns += text.turns
                report.unended += text.unended
            row_hash = self.rule.hash_of(row.key)
            yield AcceptedRow(row, index, row_hash, isinstance(text, str), tokens)

    def count(self, name: str, by: int = 1) -> None:
        """Add to one field of `CorpusCounts`."""
        counts = self.report.counts
        counts[name] = counts.get(name, 0) + by

    def identity(self) -> dict[str, Any]:
        """Return what determines the corpus: source, format, template, split."""
        template = None if self.renderer is None else self.renderer.template
        identity = reading_identity(
            self.settings, self.reading, template, self.rule, seed=self.seed
        )
        if self.renderer is not None:
            identity["turn_ends"] = list(self.renderer.ends)
        return identity

    def _text(self, item: Conversation | Document, row: Row) -> Rendered | str | None:
        if isinstance(item, Document):
            self._digest(row, item.text)
            if item.text.strip():
                self.report.documents += 1
                return item.text
            self.count("dropped_no_labels")
            return None
        conversation = self.used(item)
        self._digest(row, self.described(conversation))
        if not conversation.messages:
            self.count("dropped_no_labels")
            return None
        asked = with_system(conversation, self.settings.system_prompt)
        self.report.given_system += asked is not conversation
        assert self.renderer is not None, "plain text has no chats"
        return self.rendered(self.renderer, asked, row)

    def _new_renderer(self) -> ChatRenderer:
        chosen = self.settings
        template = load_template(self.tokenizer, chosen.chat_template, chosen.template_options)
        return ChatRenderer(
            template,
            template.turn_ends(self.teacher.end_tokens),
            reasoning=chosen.reasoning,
            supervise_empty=chosen.supervise_empty,
            everything=chosen.loss_on == "all",
        )

    def _foreign(self, row: Row, tokens: Tokens) -> BadRow | None:
        """Return the fault of a row with a token that the teacher's embedding lacks."""
        size = self.teacher.vocab_size
        if size is None or not len(tokens.input_ids) or int(tokens.input_ids.max()) < size:
            return None
        token = int(tokens.input_ids.max())
        return BadRow(
            "token beyond the teacher's embedding",
            f"{row.place}: token {token} ({self.tokenizer.convert_ids_to_tokens(token)!r})",
            expected=f"ids below {size}, the rows of the teacher's embedding",
            do="use the tokenizer that the teacher was trained with",
        )

    def _digest(self, row: Row, content: object) -> None:
        text = json.dumps([row.key, content], sort_keys=True, default=str)
        self._content.update(text.encode() + b"\n")
