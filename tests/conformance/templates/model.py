"""What a chat template of the corpus is: its text, and how a reader of it expects a turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.conformance.chats import Turn

__all__ = ["ALL_REASONING", "Parts", "Place", "Template", "bare", "simple"]

ALL_REASONING = frozenset({"reasoning_early", "reasoning_late"})
"""For templates that know nothing of `reasoning_content`."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a turn stands in its chat."""

    last: bool
    """Nothing follows."""
    late: bool
    """No turn of the user follows."""
    next: str
    """The role of the following turn; empty at the end."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a template writes for an answer after the generation prompt, in this order."""

    content: str
    end: str
    """The token that ends the turn; empty where there is none."""
    empty_thought: str = ""
    """Inserted by the template, with nothing in it."""
    thought: str = ""
    """The assistant's reasoning, with its marks."""
    lead: str = ""
    """Between the generation prompt and the content."""
    calls: str = ""


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template, and what it makes of an answer."""

    name: str
    text: str
    bos: str
    eos: str
    """The tokenizer's, which need not be the end of a turn."""
    parts: Callable[[Turn, Place], Parts]
    cannot: frozenset[str] = frozenset()
    """What makes it lose or refuse a chat: names of `expected.features`."""
    end_tokens: tuple[str, ...] = ()
    """What the model's generation config names as ends besides."""


def bare(turn: Turn) -> str:
    """Return the content that a template without a word on reasoning prints as it stands."""
    from tests.conformance.chats.model import inline_text

    return inline_text(turn) if turn.inline else turn.content


def simple(end: str, *, lead: str = "", trim: bool = False) -> Callable[[Turn, Place], Parts]:
    """Return the rule of a template that prints the content, trimmed or not, and an end."""

    def parts(turn: Turn, place: Place) -> Parts:
        content = bare(turn)
        return Parts(content.strip() if trim else content, end, lead=lead)

    return parts
