"""Reading of rows: their split, text and tokens, and the counts of what was left out.

The common part of building samples (`build.py`) and prompts (`prompts.py`).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.corpus.chat.conversation import Conversation, Document
from pipeline.corpus.chat.formats import Interpreter
from pipeline.corpus.chat.template import ChatTemplate, Rendered, TemplateRefusal, load_template
from pipeline.corpus.chat.tokenise import DocumentEnds, Tokens, document_ends, tokenise
from pipeline.corpus.reading import reading_identity, with_system
from pipeline.corpus.sample import SplitName
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.sources.rows import Row, RowSource
from pipeline.corpus.split import HeldoutRule

__all__ = ["AcceptedRow", "Intake"]


@dataclass(frozen=True, slots=True)
class AcceptedRow:
    """A row of the source with its tokens."""

    row: Row
    index: int
    """Its number among the rows read, from 0."""
    split: SplitName
    is_document: bool
    tokens: Tokens


@dataclass(slots=True)
class Intake(ABC):
    """The state of one reading of a source; a subclass chooses what of a conversation is used."""

    settings: CorpusSettings
    tokenizer: Any
    source: RowSource
    seed: int
    add_eos: bool
    """After a document."""
    rows: int = 0
    tally: dict[str, int] = field(default_factory=dict)
    template: ChatTemplate | None = None
    refusal: str = ""
    """The first rejection by the template, with the row's place."""
    content: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    rule: HeldoutRule = field(init=False)
    ends: DocumentEnds = field(init=False)

    def __post_init__(self) -> None:
        """Create the split rule and the special tokens of documents."""
        chosen = self.settings
        self.rule = HeldoutRule(
            self.seed, self.source.name, chosen.heldout_fraction, chosen.heldout_samples
        )
        self.ends = document_ends(self.tokenizer, add_bos=chosen.add_bos, add_eos=self.add_eos)

    @abstractmethod
    def used(self, conversation: Conversation) -> Conversation:
        """Return the part of a conversation that is used."""

    @abstractmethod
    def described(self, conversation: Conversation) -> list[Any]:
        """Return what determines its tokens; the digest is part of the cache's identity."""

    @abstractmethod
    def rendered(self, template: ChatTemplate, conversation: Conversation, row: Row) -> Rendered:
        """Render it.

        Raises:
            TemplateRefusal: the template rejects it.
        """

    def take(self, batch: list[Row], interpret: Interpreter) -> Iterator[AcceptedRow]:
        """Yield the next rows of the source that have tokens; count the others."""
        kept: list[tuple[Row, int, SplitName]] = []
        texts: list[Rendered | str] = []
        for row in batch:
            index, split = self.rows, self.rule.split_of(row.key)
            self.rows += 1
            text = self._text(interpret(row), row)
            if text is not None:
                kept.append((row, index, split))
                texts.append(text)
        done = tokenise(texts, tokenizer=self.tokenizer, ends=self.ends)
        for (row, index, split), text, tokens in zip(kept, texts, done, strict=True):
            yield AcceptedRow(row, index, split, isinstance(text, str), tokens)

    def count(self, name: str, by: int = 1) -> None:
        """Add to one field of `CorpusCounts`."""
        self.tally[name] = self.tally.get(name, 0) + by

    def identity(self, format_name: str, digest_name: str) -> dict[str, Any]:
        """Return what determines the corpus: source, format, template, split, digest of rows."""
        identity = reading_identity(
            self.settings, self.source, format_name, self.template, self.rule, seed=self.seed
        )
        identity["content"] |= {digest_name: self.content.hexdigest()}
        return identity

    def _text(self, item: Conversation | Document, row: Row) -> Rendered | str | None:
        if isinstance(item, Document):
            self._digest(row, item.text)
            if item.text.strip():
                return item.text
            self.count("dropped_no_labels")
            return None
        conversation = self.used(item)
        self._digest(row, self.described(conversation))
        if not conversation.messages:
            self.count("dropped_no_labels")
            return None
        if self.template is None:
            self.template = load_template(self.tokenizer, self.settings.chat_template)
        try:
            asked = with_system(conversation, self.settings.system_prompt)
            return self.rendered(self.template, asked, row)
        except TemplateRefusal as refusal:
            self.count("dropped_by_template")
            self.refusal = self.refusal or f"{row.place}: {refusal}"
            return None

    def _digest(self, row: Row, content: object) -> None:
        text = json.dumps([row.key, content], sort_keys=True, default=str)
        self.content.update(text.encode() + b"\n")
