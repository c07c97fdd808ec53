"""The outline of a rendering: the template's own text, and the places of what messages hold.

Templates are programs, but nearly all treat what a message holds as opaque. So a chat is rendered
once with marks in place of its contents. What stands between the marks is the same for all chats of
its shape; a row's own text is then compared with it, piece by piece. That proves that each content
is there, whole and in its place, at the cost of one rendering a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.corpus.chat.conversation import Message
from pipeline.corpus.chat.rendering.marks import Slot, marks_in

__all__ = ["Found", "Outline", "Place", "outline_of"]


@dataclass(frozen=True, slots=True)
class Place:
    """A position in the template's own text, which moves with the contents before it."""

    part: int
    """Which of the fixed parts."""
    offset: int


@dataclass(frozen=True, slots=True)
class Found:
    """Where an outline lies in the text of one chat."""

    parts: list[int]
    """The character at which each fixed part begins."""
    pieces: list[tuple[int, int, int]]
    """Of each slot's occurrence: first character, end, and how many characters of the content the
    template trimmed off at its beginning."""

    def at(self, place: Place) -> int:
        """Return the character of a place."""
        return self.parts[place.part] + place.offset


@dataclass(frozen=True, slots=True)
class Outline:
    """The fixed parts of a rendering and the slots between them, in the order of the text."""

    fixed: tuple[str, ...]
    slots: tuple[Slot, ...]
    """One fewer than `fixed`; a slot that the template renders twice is there twice."""

    @property
    def characters(self) -> int:
        """The number of fixed characters."""
        return sum(map(len, self.fixed))

    def place(self, position: int) -> Place:
        """Return the place of a position in the text with marks; none lies inside a mark."""
        begin = 0
        for part, text in enumerate(self.fixed):
            if position <= begin + len(text):
                return Place(part, max(0, position - begin))
            begin += len(text)
            if part < len(self.slots):
                begin += len(self.slots[part].mark)
        return Place(len(self.fixed) - 1, len(self.fixed[-1]))

    def find(self, text: str, messages: Sequence[Message]) -> Found | None:
        """Find the outline in the text of a chat of this shape; None where it does not fit."""
        if not text.startswith(self.fixed[0]):
            return None
        at = len(self.fixed[0])
        parts, pieces = [0], []
        for slot, following in zip(self.slots, self.fixed[1:], strict=True):
            value = str(messages[slot.message][slot.key])
            for variant in _variants(value):
                if text.startswith(variant, at) and text.startswith(following, at + len(variant)):
                    break
            else:
                return None
            pieces.append((at, at + len(variant), max(0, value.find(variant))))
            at += len(variant)
            parts.append(at)
            at += len(following)
        return Found(parts, pieces) if at == len(text) else None


def outline_of(text: str, slots: Sequence[Slot]) -> Outline:
    """Divide a text with marks into fixed parts and slots."""
    by_place = list(marks_in(text, slots))
    fixed, begin = [], 0
    for at, slot in by_place:
        fixed.append(text[begin:at])
        begin = at + len(slot.mark)
    return Outline((*fixed, text[begin:]), tuple(slot for _, slot in by_place))


_TRIMS: Mapping[str, Callable[[str], str]] = {
    "both": str.strip,
    "begin": str.lstrip,
    "end": str.rstrip,
    "lines": lambda text: text.strip("\n"),
    "first lines": lambda text: text.lstrip("\n"),
    "last lines": lambda text: text.rstrip("\n"),
}


def _variants(value: str) -> Iterator[str]:
    """Yield a content as templates render it: as it is, trimmed, or inside a JSON text."""
    yield value
    if value[:1].isspace() or value[-1:].isspace():
        yield from (trim(value) for trim in _TRIMS.values())
    for ascii_only in (False, True):
        quoted = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        if quoted != value:
            yield quoted
