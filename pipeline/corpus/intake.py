"""Reading of rows: their split, text and tokens, and the counts of what was left out.

The common part of building samples (`build.py`) and prompts (`prompts.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.corpus.bad_rows import BadRows
from pipeline.corpus.chat.conversation import Conversation, Document
from pipeline.corpus.chat.formats import Interpreter
from pipeline.corpus.chat.rendering.encoder import TextEncoder
from pipeline.corpus.chat.rendering.render import ChatRenderer, Rendered
from pipeline.corpus.chat.rendering.template import load_template
from pipeline.corpus.chat.rendering.tokenise import DocumentEnds, Tokens, document_ends, tokenise
from pipeline.corpus.reading import reading_identity, with_system
from pipeline.corpus.sample import SplitName
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.sources.rows import BadRow, Row, RowSource
from pipeline.corpus.split import HeldoutRule, SmallCorpus
from pipeline.errors import CorpusError

__all__ = ["AcceptedRow", "Intake", "TeacherTokens"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AcceptedRow:
    """A row of the source with its tokens."""

    row: Row
    index: int
    """Its number among the rows read, from 0."""
    split: SplitName
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
    """The state of one reading of a source; a subclass chooses what of a conversation is used."""

    settings: CorpusSettings
    tokenizer: Any
    source: RowSource
    seed: int
    teacher: TeacherTokens
    add_eos: bool
    """After a document."""
    rows: int = 0
    tally: dict[str, int] = field(default_factory=dict)
    renderer: ChatRenderer | None = None
    """Made when the first chat comes."""
    content: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    documents: int = 0
    given_system: int = 0
    """Chats that had no system message and got the one of the settings."""
    turns: int = 0
    """Supervised turns so far."""
    unended: int = 0
    """Those that no token which ends generation closes."""
    encoder: TextEncoder = field(init=False)
    bad: BadRows = field(init=False)
    rule: HeldoutRule = field(init=False)
    small: SmallCorpus = field(init=False)
    ends: DocumentEnds = field(init=False)

    def __post_init__(self) -> None:
        """Create the split rule and the special tokens of documents."""
        chosen = self.settings
        self.encoder = TextEncoder(self.tokenizer)
        self.bad = BadRows(chosen)
        self.rule = HeldoutRule(
            self.seed, self.source.name, chosen.heldout_fraction, chosen.heldout_samples
        )
        self.small = SmallCorpus(self.rule)
        self.ends = document_ends(self.tokenizer, add_bos=chosen.add_bos, add_eos=self.add_eos)

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

    def take(self, batch: list[Row], interpret: Interpreter) -> Iterator[AcceptedRow]:
        """Yield the next rows of the source that have tokens; count the others."""
        kept: list[tuple[Row, int, SplitName]] = []
        texts: list[Rendered | str] = []
        for row in batch:
            index, split = self.rows, self.rule.split_of(row.key)
            self.rows += 1
            try:
                text = self._text(interpret(row), row)
            except BadRow as bad:
                self.bad.add(bad)
                continue
            if text is not None:
                kept.append((row, index, split))
                texts.append(text)
        done = tokenise(texts, encoder=self.encoder, ends=self.ends)
        for (row, index, split), text, tokens in zip(kept, texts, done, strict=True):
            foreign = self._foreign(row, tokens)
            if foreign is not None:
                self.bad.add(foreign)
                continue
            if isinstance(text, Rendered):
                self.turns += text.turns
                self.unended += text.unended
            yield AcceptedRow(row, index, split, isinstance(text, str), tokens)

    def count(self, name: str, by: int = 1) -> None:
        """Add to one field of `CorpusCounts`."""
        self.tally[name] = self.tally.get(name, 0) + by

    def close(self) -> None:
        """Report the bad rows and the turns without an end.

        Raises:
            CorpusError: the run refuses bad rows, or there are too many of them.
        """
        name = self.settings.dataset_name
        if self.bad.count == self.rows and self.settings.on_bad_row != "refuse":
            raise CorpusError(
                f"{name}: none of its {self.rows} rows can be used",
                expected="rows that can be read and rendered",
                do="check --corpus.format, --corpus.loss_on and --chat_template:"
                + self.bad.listed(),
            )
        self.bad.finish(self.rows)
        if self.unended and self.settings.loss_on == "assistant":
            ends = "" if self.renderer is None else ", ".join(self.renderer.ends)
            _log.warning(
                "%s of %d supervised turns end without a token that ends generation (%s): from "
                "them a student does not learn to stop; check --chat_template",
                "all" if self.unended == self.turns else self.unended, self.turns, ends or "none",
            )  # fmt: skip
        if self.settings.system_prompt is not None and not self.given_system:
            _log.warning(
                "%s: --corpus.system_prompt has no effect: each chat has a system message", name
            )
        if self.documents and self.add_eos and self.ends.eos is None:
            _log.warning(
                "%s: --corpus.add_eos has no effect: the tokenizer has no EOS, so from documents a "
                "student does not learn to stop", name,
            )  # fmt: skip
        moved = self.small.moved()
        if moved:
            _log.warning(
                "heldout_fraction %g picks %d of %d rows; the %d rows of the smallest hashes are "
                "held out as well",
                self.settings.heldout_fraction, self.small.heldout, self.small.rows, len(moved),
            )  # fmt: skip
        wanted = self.settings.heldout_fraction and self.settings.heldout_samples != 0
        if wanted and self.small.rows and not moved and not self.small.heldout:
            raise CorpusError(
                f"{name}: no row is held out (usable rows: {self.small.rows})",
                expected="at least 2, one to train on and one to evaluate on",
                do="give more rows, or --corpus.heldout_fraction 0 to train without evaluation"
                + self.bad.besides(),
            )

    def identity(self, format_name: str, digest_name: str) -> dict[str, Any]:
        """Return what determines the corpus: source, format, template, split, digest of rows."""
        template = None if self.renderer is None else self.renderer.template
        identity = reading_identity(
            self.settings, self.source, format_name, template, self.rule, seed=self.seed
        )
        identity["content"] |= {digest_name: self.content.hexdigest()}
        if self.renderer is not None:
            identity["turn_ends"] = list(self.renderer.ends)
        return identity

    def _text(self, item: Conversation | Document, row: Row) -> Rendered | str | None:
        if isinstance(item, Document):
            self._digest(row, item.text)
            if item.text.strip():
                self.documents += 1
                return item.text
            self.count("dropped_no_labels")
            return None
        conversation = self.used(item)
        self._digest(row, self.described(conversation))
        if not conversation.messages:
            self.count("dropped_no_labels")
            return None
        asked = with_system(conversation, self.settings.system_prompt)
        self.given_system += asked is not conversation
        return self.rendered(self._renderer(), asked, row)

    def _renderer(self) -> ChatRenderer:
        if self.renderer is None:
            chosen = self.settings
            template = load_template(self.tokenizer, chosen.chat_template, chosen.template_options)
            self.renderer = ChatRenderer(
                template,
                template.turn_ends(self.teacher.end_tokens),
                reasoning=chosen.reasoning,
                supervise_empty=chosen.supervise_empty,
                everything=chosen.loss_on == "all",
            )
        return self.renderer

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
        self.content.update(text.encode() + b"\n")
