"""What is noticed of single rows on the way: roles, tools, reasoning, and what looks wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.corpus.chat.content import REASONING_KEYS
from pipeline.corpus.chat.conversation import Conversation, Document, role_of
from pipeline.corpus.chat.rendering.template import TemplateRefusal
from pipeline.corpus.chat.tool_calls import listed
from pipeline.corpus.intake import AcceptedRow, Intake
from pipeline.corpus.prepared.blocks import TokenisedRow
from pipeline.corpus.reading import with_system
from pipeline.corpus.sources.rows import BadRow, Row

__all__ = ["First", "Seen"]

_COMPARED = 200
"""Rows whose mask is compared with {% generation %}: each is rendered twice more for it."""
_ROLE_KEYS = ("role", "from")


@dataclass(slots=True)
class First:
    """How many rows something is true of, and the first of them."""

    rows: int = 0
    number: int = -1

    def add(self, number: int) -> None:
        """Add a row."""
        self.rows += 1
        if self.number < 0:
            self.number = number


@dataclass
class Seen:
    """Notices what the numbers of a corpus do not say."""

    intake: Intake
    roles: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Messages by a role's name in the data and ours."""
    chats: int = 0
    documents: int = 0
    with_system: int = 0
    with_tools: int = 0
    with_calls: int = 0
    with_reasoning: int = 0
    flagged: int = 0
    """Chats of which the data itself leaves answers out of the loss, or continues one."""
    spelled: Counter[str] = field(default_factory=Counter)
    """Special tokens that the data spells out in a text, with the number of texts."""
    spelling: First = field(default_factory=First)
    """Rows that do so."""
    everything: First = field(default_factory=First)
    """Chats of which all tokens are supervised."""
    nothing: First = field(default_factory=First)
    """Chats of which none is."""
    double_bos: First = field(default_factory=First)
    without_bos: First = field(default_factory=First)
    unknown: First = field(default_factory=First)
    """Rows with the tokenizer's unknown token."""
    lost_system: First = field(default_factory=First)
    unlike_marks: First = field(default_factory=First)
    """Chats whose mask is not what the template's {% generation %} marks."""
    compared: int = 0
    repeated: First = field(default_factory=First)
    _texts: dict[bytes, int] = field(default_factory=dict)

    def interpreted(self, number: int, row: Row) -> None:
        """Notice what a row says, before it is rendered."""
        try:
            item = self.intake.reading.interpret(row)
        except BadRow:
            return
        if isinstance(item, Document):
            self.documents += 1
            self._read(number, [item.text])
            return
        self.chats += 1
        chat = self.intake.used(item)
        roles = [message["role"] for message in chat.messages]
        self.with_system += "system" in roles
        self.with_tools += chat.tools is not None
        self.with_calls += any(message.get("tool_calls") for message in chat.messages)
        self.with_reasoning += any(
            key in message for message in chat.messages for key in REASONING_KEYS
        ) or any("</think>" in str(message["content"]) for message in chat.messages)
        self.flagged += bool(chat.unsupervised or chat.unfinished or chat.first_supervised)
        self._read(number, [str(message["content"]) for message in chat.messages])
        for name in _raw_roles(row, self.intake):
            self.roles[name, role_of(name) or "unknown"] += 1
        if self.compared < _COMPARED and self._is_comparable(chat):
            self._compare(number, with_system(chat, self.intake.settings.system_prompt), row)

    def taken(self, number: int, taken: AcceptedRow, samples: list[TokenisedRow]) -> None:
        """Notice what the tokens of a row say."""
        ids, mask = taken.tokens.input_ids, taken.tokens.loss_mask
        tokenizer = self.intake.tokenizer
        bos, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
        if bos is not None and len(ids) > 1 and ids[0] == bos:
            if ids[1] == bos:
                self.double_bos.add(number)
        elif not taken.is_document and self._own_bos is not None:
            self.without_bos.add(number)
        if unknown not in (None, bos, tokenizer.eos_token_id) and bool((ids == unknown).any()):
            self.unknown.add(number)
        if not taken.is_document and len(ids) > 1:
            if mask[1:].all():
                self.everything.add(number)
            elif not mask.any():
                self.nothing.add(number)
        if samples:
            if ids.tobytes() in self._texts:
                self.repeated.add(number)
            else:
                self._texts[ids.tobytes()] = number

    def quarantined(self, number: int, kind: str, found: str) -> None:
        """Notice why a row cannot be used."""
        if kind == "content lost by the chat template" and "(system)" in found:
            self.lost_system.add(number)

    @cached_property
    def _own_bos(self) -> int | None:
        """The BOS that the tokenizer itself puts before a text."""
        bos = self.intake.tokenizer.bos_token_id
        first = list(self.intake.tokenizer("a")["input_ids"])[:1]
        return bos if bos is not None and first == [bos] else None

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        decoder = self.intake.tokenizer.added_tokens_decoder
        names = [str(token) for token in decoder.values() if token.special and str(token).strip()]
        return (
            re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
            if names
            else None
        )

    def _read(self, number: int, texts: Sequence[str]) -> None:
        pattern = self._special
        if pattern is None:
            return
        names = [name for text in texts for name in {*pattern.findall(text)}]
        self.spelled.update(names)
        if names:
            self.spelling.add(number)

    def _is_comparable(self, chat: Conversation) -> bool:
        renderer = self.intake.renderer
        plain = not (chat.unsupervised or chat.unfinished or chat.first_supervised or chat.tools)
        return (
            renderer is not None
            and renderer.template.marks_generation
            and not renderer.everything
            and plain
            and all(set(message) == {"role", "content"} for message in chat.messages)
            and any(message["role"] == "assistant" for message in chat.messages)
        )

    def _compare(self, number: int, chat: Conversation, row: Row) -> None:
        """Compare the supervised characters with those that the template marks."""
        renderer = self.intake.renderer
        assert renderer is not None
        try:
            rendered = renderer.render(chat, row.place)
            marked = renderer.template.render_generation(chat.messages, chat.tools)
        except (BadRow, TemplateRefusal):
            return
        self.compared += 1
        ours, theirs = (
            _characters(spans, len(rendered.text)) for spans in (rendered.spans, marked)
        )
        text = np.array(list(rendered.text))
        # The token that ends a turn, and white space at its border, are a matter of taste.
        more = "".join(text[ours & ~theirs])
        fewer = "".join(text[theirs & ~ours])
        for end in renderer.ends:
            more, fewer = more.replace(end, ""), fewer.replace(end, "")
        if more.strip() or fewer.strip():
            self.unlike_marks.add(number)


def _characters(spans: Any, length: int) -> Any:
    found = np.zeros(length, np.bool_)
    for begin, end in spans:
        found[begin:end] = True
    return found


def _raw_roles(row: Row, intake: Intake) -> list[str]:
    """Return the names of the roles of a row's messages, as the data has them."""
    columns = intake.reading.format
    column = next(iter(row.data)) if columns is None else columns.column
    if column is None or column not in row.data:
        return []
    items = listed(row.data[column], row.place, "the conversation")
    found = []
    for item in items if isinstance(items, (list, tuple)) else ():
        names = [item[key] for key in _ROLE_KEYS if isinstance(item, dict) and item.get(key)]
        found += [name for name in names[:1] if isinstance(name, str)]
    return found
