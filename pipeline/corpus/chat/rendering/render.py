"""A chat as text with its supervised characters, or the reason why the row cannot be used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.corpus.chat.conversation import Conversation, Message
from pipeline.corpus.chat.rendering.forms import forms, is_empty_answer
from pipeline.corpus.chat.rendering.marks import mark_calls, mark_contents, shape_of
from pipeline.corpus.chat.rendering.outline import Found, Outline, Place, outline_of
from pipeline.corpus.chat.rendering.template import ChatTemplate, TemplateRefusal
from pipeline.corpus.chat.rendering.turns import MarkedChat
from pipeline.corpus.settings import Reasoning
from pipeline.corpus.sources.rows import BadRow

__all__ = ["ChatRenderer", "Rendered"]

_OUTLINES = 4096
"""Shapes remembered; chats with tools of their own each have another."""
_REMEMBERED = 1 << 24
"""Characters of the template's own text, tools included, in all of them together."""
_GIVE = "give a template that renders it (--chat_template), or take it out of the data"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, with the supervised character ranges."""

    text: str
    spans: list[tuple[int, int]]
    turns: int = 0
    """Supervised turns that are finished."""
    unended: int = 0
    """Those of them that no token which ends generation closes."""


@dataclass(frozen=True, slots=True)
class _Turn:
    spans: tuple[tuple[Place, Place], ...]
    ended: bool
    content_end: Place
    rest: str


@dataclass(frozen=True, slots=True)
class _Shape:
    """What is known of all chats of one shape."""

    outline: Outline
    turns: Mapping[int, _Turn]
    lost: BadRow | None
    """Why no chat of this shape can be used; its place is added by the row."""


@dataclass(slots=True)
class ChatRenderer:
    """Renders chats and finds the supervised text; remembers each shape of chat it has met."""

    template: ChatTemplate
    ends: tuple[str, ...]
    """Texts of the tokens that end a turn, the longest first."""
    reasoning: Reasoning = "keep"
    supervise_empty: bool = False
    everything: bool = False
    """Whether all characters are supervised, whatever the role."""
    _shapes: OrderedDict[Hashable, _Shape] = field(default_factory=OrderedDict)
    _remembered: int = 0

    def render(self, conversation: Conversation, place: str) -> Rendered:
        """Render without a generation prompt and find the supervised turns.

        A turn extends from where generation begins to the end of the token that ends it. White
        space that the template puts after that token is not part of it, since no model generates
        it.

        Args:
            conversation: at least one message.
            place: the row's name in messages.

        Raises:
            BadRow: the template rejects it, loses some of it, or its turns cannot be found.
            CorpusError: the template has a mistake.
        """
        messages, text, shape, found = self._fitting(conversation, place, prompt=False)
        if found is None:
            return Rendered(text, [(0, len(text))])
        return self._spans(conversation, messages, text, shape, found)

    def render_prompt(self, conversation: Conversation, place: str) -> Rendered:
        """Render with the generation prompt, so that the next token is the assistant's first.

        An unfinished answer is the end of the prompt: the next token continues it.

        Raises:
            BadRow: the template rejects it, or loses or alters some of it.
            CorpusError: the template has a mistake.
        """
        prompt = not conversation.unfinished
        messages, text, shape, found = self._fitting(conversation, place, prompt=prompt)
        if prompt or found is None:
            return Rendered(text + self.template.missing_header, [])
        end = found.at(shape.turns[len(messages) - 1].content_end)
        return Rendered(text[:end], [])

    def _fitting(
        self, conversation: Conversation, place: str, *, prompt: bool
    ) -> tuple[list[Message], str, _Shape, Found | None]:
        """Return the first form of a chat that the template renders without loss, and its text.

        Returns:
            The messages, their text and shape, and what stands where; None where nobody asks,
            because everything is supervised.

        Raises:
            BadRow: there is no such form.
        """
        problem: BadRow | None = None
        altered: BadRow | None = None
        for given, messages in forms(conversation, self.template, self.reasoning):
            try:
                text = self.template.render(given, conversation.tools, prompt=prompt)
                shape = self._shape(messages, conversation.tools, prompt=prompt)
            except TemplateRefusal as refusal:
                problem = problem or _rejected(place, refusal)
                continue
            if shape.lost is not None:
                problem = problem or _at(place, shape.lost)
                continue
            if self.everything and not conversation.unfinished:
                return messages, text, shape, None
            found = shape.outline.find(text, messages)
            if found is not None:
                return messages, text, shape, found
            altered = altered or _altered(place)
        raise _first(problem, altered)

    def _shape(
        self, messages: Sequence[Message], tools: list[Any] | None, *, prompt: bool
    ) -> _Shape:
        key = (prompt, shape_of(messages, tools, self._reasoning_key(messages)))
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = self._new_shape(messages, tools, prompt=prompt)
            self._remembered += shape.outline.characters
            while len(self._shapes) > _OUTLINES or self._remembered > _REMEMBERED:
                _, oldest = self._shapes.popitem(last=False)
                self._remembered -= oldest.outline.characters
        return shape

    def _reasoning_key(self, messages: Iterable[Message]) -> str:
        key = "reasoning_content"
        if any(len(message) > 2 for message in messages):
            key = self.template.reasoning_key
        return key

    def _new_shape(
        self, messages: Sequence[Message], tools: list[Any] | None, *, prompt: bool
    ) -> _Shape:
        template = self.template
        marked, slots = mark_contents(messages, self._reasoning_key(messages))
        text = template.render(marked, tools, prompt=prompt)
        outline = outline_of(text, slots)
        lost: BadRow | None = None
        for slot in slots:
            count = text.count(slot.mark)
            role = marked[slot.message]["role"]
            what = "content" if slot.key == "content" else "reasoning"
            where = f"message {slot.message + 1} ({role})"
            if not count and not (what == "reasoning" and self.reasoning == "template"):
                do = "; or set --corpus.reasoning template or drop" if what == "reasoning" else ""
                lost = lost or _lost(f"{where}: its {what}", do)
            elif count > 1 and role == "assistant" and not self.everything and not prompt:
                lost = lost or BadRow(
                    "answer rendered twice", f"{where}: its {what} appears {count} times in what "
                    "the chat template renders", expected="once",
                )  # fmt: skip
        lost = lost or self._lost_calls(marked, tools, prompt=prompt)
        turns: dict[int, _Turn] = {}
        if lost is None and not prompt:
            chat = MarkedChat(template, marked, tools, slots, text, self.ends, self.supervise_empty)
            for number, turn in chat.turns().items():
                spans = tuple((outline.place(a), outline.place(b)) for a, b in turn.spans)
                end = outline.place(turn.content_end)
                other = chat.intruder(number, turn)
                if other is not None and not self.everything:
                    lost = lost or _broken(number, other)
                turns[number] = _Turn(spans, turn.ended, end, turn.rest)
        return _Shape(outline, turns, lost)

    def _lost_calls(
        self, marked: Sequence[Message], tools: list[Any] | None, *, prompt: bool
    ) -> BadRow | None:
        if tools is None and not any(message.get("tool_calls") for message in marked):
            return None
        messages, named, marks = mark_calls(marked, tools)
        text = self.template.render(messages, named, prompt=prompt)
        missing = next((what for mark, what in marks if mark not in text), None)
        return None if missing is None else _lost(missing, "")

    def _spans(
        self,
        conversation: Conversation,
        messages: Sequence[Message],
        text: str,
        shape: _Shape,
        found: Found,
    ) -> Rendered:
        last = len(messages) - 1
        if conversation.unfinished:
            text = text[: found.at(shape.turns[last].content_end)]
        if self.everything:
            return Rendered(text, [(0, len(text))])
        spans: list[tuple[int, int]] = []
        turns = unended = 0
        for number, turn in shape.turns.items():
            if not self._is_supervised(conversation, messages, number):
                continue
            own = [(found.at(a), min(found.at(b), len(text))) for a, b in turn.spans]
            if own and turn.rest and text.startswith(turn.rest, own[0][0]):
                own[0] = (own[0][0] + len(turn.rest), own[0][1])
            if conversation.answer_prefix and number == conversation.first_supervised:
                begin = _after_prefix(number, conversation.answer_prefix, shape, found)
                own = [(max(a, begin), b) for a, b in own if b > begin]
            spans += [(a, b) for a, b in own if a < b]
            if own and not (conversation.unfinished and number == last):
                turns += 1
                unended += not turn.ended
        return Rendered(text, sorted(spans), turns, unended)

    def _is_supervised(
        self, conversation: Conversation, messages: Sequence[Message], number: int
    ) -> bool:
        if number < conversation.first_supervised or number in conversation.unsupervised:
            return False
        return self.supervise_empty or not is_empty_answer(messages[number])


def _after_prefix(number: int, prefix: str, shape: _Shape, found: Found) -> int:
    """Return where the text after the prefix of an answer begins."""
    for slot, (begin, end, trimmed) in zip(shape.outline.slots, found.pieces, strict=True):
        if slot.message == number and slot.key == "content":
            return min(end, begin + max(0, len(prefix) - trimmed))
    return 0


def _lost(what: str, more: str) -> BadRow:
    return BadRow(
        "content lost by the chat template",
        f"{what} does not appear in what the chat template renders",
        do=_GIVE + more,
    )


def _broken(number: int, other: int) -> BadRow:
    return BadRow(
        "an answer around another message",
        f"message {number + 1} (assistant): the chat template renders it around the text of "
        f"message {other + 1}, which would be supervised with it",
        expected="each message in one piece",
        do=_GIVE,
    )


def _at(place: str, problem: BadRow) -> BadRow:
    return BadRow(
        problem.kind, f"{place}: {problem.found}", expected=problem.expected, do=problem.do
    )


def _rejected(place: str, refusal: TemplateRefusal) -> BadRow:
    return BadRow("rejected by the chat template", f"{place}: {refusal}")


def _first(problem: BadRow | None, altered: BadRow | None) -> BadRow:
    """Return the fault to report: one that names what is lost says more."""
    fault = problem or altered
    assert fault is not None
    return fault


def _altered(place: str) -> BadRow:
    return BadRow(
        "content altered by the chat template",
        f"{place}: the messages cannot be found in what the chat template renders",
        expected="a template that renders what a message holds as it is",
        do="give such a template in --chat_template, or set --corpus.loss_on all",
    )
