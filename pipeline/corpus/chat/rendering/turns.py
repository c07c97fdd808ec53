"""Where the assistant's turns begin and end in a rendering, found in its text with marks.

A turn is what a model would generate: from the end of the generation prompt to the token that ends
generation. It is found by what two renderings share: the chat up to the turn with the generation
prompt, and the whole chat. A template may close its last turn unlike the earlier ones, fold the
system text into the last question, or put an empty thought before an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pipeline.corpus.chat.conversation import Message
from pipeline.corpus.chat.rendering.marks import QUESTION, Slot, last_mark, marks_in
from pipeline.corpus.chat.rendering.shared import (
    common_length,
    whole_markup,
    without_prompt,
    without_thoughts,
)
from pipeline.corpus.chat.rendering.template import ChatTemplate

__all__ = ["MarkedChat", "Turn"]

_HEADER_PROBE = "QXPROBEHJWVKQ"
_TELLING = 3
"""Characters of a generation prompt that do not occur by accident."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The supervised characters of one turn, as positions in the text with marks."""

    spans: tuple[tuple[int, int], ...]
    ended: bool
    """Whether the last span ends with a token that ends generation."""
    content_end: int
    """Where the last text of the message ends."""
    rest: str
    """The end of the generation prompt that is not in the chat, such as the opening of a thought.
    An answer whose text begins with it begins after it."""


@dataclass(frozen=True)
class MarkedChat:
    """A chat with marks in place of its contents, and how the template renders it."""

    template: ChatTemplate
    messages: Sequence[Message]
    tools: list[Any] | None
    slots: Sequence[Slot]
    text: str
    ends: tuple[str, ...]
    """Texts of the tokens that end a turn."""
    empty_thoughts: bool
    """Whether an empty thought that the template inserts is supervised."""
    is_probe: bool = False

    def turns(self) -> dict[int, Turn]:
        """Return the turn of each message of the assistant, by the message's number."""
        generated = (
            self.template.render_generation(self.messages, self.tools)
            if self.template.marks_generation
            else None
        )
        turns: dict[int, Turn] = {}
        for number, message in enumerate(self.messages):
            if message["role"] == "assistant":
                done = max((stop for turn in turns.values() for _, stop in turn.spans), default=0)
                turns[number] = self._turn(number, generated, done)
        return turns

    def _turn(self, number: int, generated: list[tuple[int, int]] | None, done: int) -> Turn:
        own = self._places_of(number)
        start, rest = self._start(number, own)
        stop, ended = self._end(number, start, own)
        content_end = max((end for _, end in own), default=start)
        spans = [(start, stop)]
        if generated is not None:
            spans, ended = self._generated(generated, spans[0], number, done)
        first = min((begin for begin, _ in own), default=stop)
        kept = spans if self.empty_thoughts else without_thoughts(self.text, spans, first)
        begins = bool(kept) and kept[0][0] == start
        return Turn(tuple(kept), ended, content_end, rest if begins else "")

    def intruder(self, number: int, turn: Turn) -> int | None:
        """Return another message whose text stands among the supervised text of a turn."""
        inside = (
            message
            for at, _, message in self._places
            if message != number and any(begin <= at < stop for begin, stop in turn.spans)
        )
        return next(inside, None)

    @cached_property
    def _places(self) -> list[tuple[int, int, int]]:
        """Return first character, end and message of each mark, in the order of the text."""
        return [
            (at, at + len(slot.mark), slot.message) for at, slot in marks_in(self.text, self.slots)
        ]

    @cached_property
    def _by_message(self) -> dict[int, list[tuple[int, int]]]:
        found: dict[int, list[tuple[int, int]]] = {}
        for begin, end, message in self._places:
            found.setdefault(message, []).append((begin, end))
        return found

    def _places_of(self, number: int) -> list[tuple[int, int]]:
        return self._by_message.get(number, [])

    def _start(self, number: int, own: list[tuple[int, int]]) -> tuple[int, str]:
        """Return where generation begins, and what of the prompt is not shared with the chat.

        It begins after what the prompt and the chat share. Where they share not all of the prompt
        (the last turn before it is closed otherwise, the prompt opens a thought) or there is no
        prompt, as after another answer, it begins where it does in a chat of one question and this
        answer.
        """
        first = own[0][0] if own else None
        found = self._after_prompt(number, first)
        doubtful = found is None or found[1] or self._follows_answer(number)
        if doubtful and first is not None and not self.is_probe:
            lead = self._lead(number)
            if lead is not None and self.text[:first].endswith(lead[0]):
                return first - len(lead[0]), lead[1]
        return found or (self._header_end(number, 0, first), "")

    def _follows_answer(self, number: int) -> bool:
        return number > 0 and self.messages[number - 1]["role"] == "assistant"

    def _after_prompt(self, number: int, first: int | None) -> tuple[int, str] | None:
        """Return where the prompt ends in the chat, and its end that is not there; or None."""
        known = self._after_known_prompt(number, first)
        if known is not None:
            return known, ""
        before = self.messages[:number]
        prompt = self.template.render_or_empty(before, self.tools, prompt=True) if before else ""
        aligned = self._after_last_mark(prompt, first) if prompt else None
        if aligned is None:
            return None
        floor, tail = aligned
        limit = len(self.text) if first is None else first
        length = common_length(tail, self.text[floor:limit])
        if not self._has_prompt(prompt, before):
            # No generation prompt: white space belongs to the turn, all else is its header.
            header = self._header_end(number, floor, first)
            blank = not self.text[floor + length : header].strip()
            return (floor + length if blank else header), ""
        begin = self._before_token(floor + whole_markup(tail, length), floor)
        rest = tail[begin - floor :]
        skipped = without_prompt(self.text[begin:limit], rest)
        return (begin, rest) if skipped is None else (begin + skipped, "")

    def _after_known_prompt(self, number: int, first: int | None) -> int | None:
        """Return where a turn begins if the template's generation prompt stands once before it.

        It spares a rendering of all that is before each turn, which makes long chats quadratic.
        """
        prompt = self.template.generation_prompt
        # The text before must be that of the very message before, or the prompt may be another's.
        floor = max((end for _, end in self._places_of(number - 1)), default=None)
        if len(prompt.strip()) < _TELLING or floor is None:
            return None
        limit = next((at for at, _, _ in self._places if at >= floor), len(self.text))
        if first not in (None, limit) or self.text.count(prompt, floor, limit) != 1:
            return None
        return self.text.index(prompt, floor, limit) + len(prompt)

    def _has_prompt(self, prompt: str, before: Sequence[Message]) -> bool:
        """Whether the template added a generation prompt to a chat."""
        known = self.template.generation_prompt
        return (bool(known) and prompt.endswith(known)) or (
            prompt != self.template.render_or_empty(before, self.tools)
        )

    def _after_last_mark(self, prompt: str, first: int | None) -> tuple[int, str] | None:
        """Return the end of the last mark before a turn, in the chat, and what the prompt has then.

        Only the text after that mark is compared: before it, the two may differ for good reasons,
        such as the system text inside the last question. None: the chat has that mark elsewhere.
        """
        found = last_mark(prompt)
        if found is None:
            return 0, prompt
        mark, end = found
        at = self.text.rfind(mark, 0, first)
        return None if at < 0 else (at + len(mark), prompt[end:])

    def _lead(self, number: int) -> tuple[str, str] | None:
        """Return what stands before the answer's text in a chat of one question and this answer.

        Returns:
            It, from where generation begins, and what `_start` returns of the prompt; None where
            the template rejects such a chat.
        """
        question = Slot(QUESTION, 0, "content")
        messages = [{"role": "user", "content": QUESTION}, self.messages[number]]
        text = self.template.render_or_empty(messages, self.tools)
        slots = [question, *(Slot(s.mark, 1, s.key) for s in self.slots if s.message == number)]
        chat = replace(self, messages=messages, slots=slots, text=text, is_probe=True)
        own = chat._places_of(1)
        if not own:
            return None
        start, rest = chat._start(1, own)
        return text[start : own[0][0]], rest

    def _before_token(self, at: int, floor: int) -> int:
        """Move a place inside a special token to the token's beginning."""
        for token in self.template.special_tokens:
            begin = self.text.rfind(token, floor, at + len(token) - 1)
            if begin >= 0 and begin < at < begin + len(token):
                return begin
        return at

    def _header_end(self, number: int, floor: int, first: int | None) -> int:
        if first is not None:
            return first
        probed = [*self.messages[:number], {"role": "assistant", "content": _HEADER_PROBE}]
        text = self.template.render_or_empty(probed, self.tools)
        head = text.partition(_HEADER_PROBE)[0] if _HEADER_PROBE in text else ""
        return max(floor, common_length(head, self.text))

    def _end(self, number: int, start: int, own: list[tuple[int, int]]) -> tuple[int, bool]:
        """Return where a turn ends, and whether a token that ends generation is its last."""
        last = max((end for _, end in own), default=start)
        limit = next((b for b, _, n in self._places if b >= last and n != number), len(self.text))
        # The text of calls, or of a thought without an answer, may be several parts that each have
        # an end; the last one counts.
        content = self.messages[number].get("content")
        thought_only = bool(own) and not (content or "").strip()
        parts = thought_only or bool(self.messages[number].get("tool_calls"))
        is_last = number == len(self.messages) - 1
        ends = self._ends_in(last, limit)
        shared, found = limit, ends[0] if ends else None
        if (parts and len(ends) > 1) or not ends:
            shared = len(self.text) if is_last else self._shared_end(number, last, limit)
        if parts:
            found = next((end for end in reversed(ends) if end <= shared), found)
        if found is not None:
            return found, True
        return self._outside_of_tokens(last, shared), False

    def _shared_end(self, number: int, last: int, limit: int) -> int:
        """Return up to where the chat that ends with this turn agrees with the whole chat."""
        upto = self.template.render_or_empty(self.messages[: number + 1], self.tools)
        found = last_mark(upto)
        at = 0 if found is None else found[1]
        begin = max((end for _, end, _ in self._places if end <= last), default=0)
        return max(last, begin + common_length(upto[at:], self.text[begin:limit]))

    def _ends_in(self, begin: int, limit: int) -> list[int]:
        """Return where the tokens that end a turn end, in order."""
        if not self.ends:
            return []
        return [match.end() for match in self._end_pattern.finditer(self.text, begin, limit)]

    @cached_property
    def _end_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.ends)))

    def _outside_of_tokens(self, last: int, stop: int) -> int:
        """Move an end out of a special token, and before the white space after one."""
        stop = self._before_token(stop, last)
        trimmed = self.text[last:stop].rstrip()
        if trimmed.endswith(self.template.special_tokens):
            return last + len(trimmed)
        return stop

    def _generated(
        self, generated: list[tuple[int, int]], turn: tuple[int, int], number: int, done: int
    ) -> tuple[list[tuple[int, int]], bool]:
        """Return what {% generation %} marks of a turn, with the token that ends it.

        A block may hold calls alone, before the content or after it; `done` is where the blocks of
        earlier turns end.
        """
        own = self._places_of(number)
        others = [place for place in self._places if place[2] != number]
        floor = max((end for _, end, _ in others if end <= turn[0]), default=0)
        spans = [
            (begin, stop)
            for begin, stop in generated
            if any(begin < end and stop > at for at, end in own)
            or (
                max(floor, done) <= begin <= turn[1]
                and not any(begin < end and stop > at for at, end, _ in others)
            )
        ]
        if not spans:
            return [], True
        begin, stop = spans[-1]
        last = max((end for _, end in own), default=begin)
        inside = self._ends_in(min(max(last, begin), stop), stop)
        if inside and not self.text[inside[-1] : stop].strip():
            return [*spans[:-1], (begin, inside[-1])], True
        if turn[1] >= stop and self.text[: turn[1]].endswith(self.ends or ("\0",)):
            return [*spans[:-1], (begin, turn[1])], True
        return spans, False
