"""Text as it can be shown: what would act on a page or a terminal, as its code."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["code_of", "is_harmless", "printable", "render_template"]


def printable(text: str) -> str:
    """Return a text with what would act instead of being read shown as its code.

    Control characters are not allowed in HTML and drive a terminal; a right-to-left override would
    turn the words around it about. Newlines and tabs stay.
    """
    return "".join(char if char in "\n\t" or is_harmless(char) else code_of(char) for char in text)


def is_harmless(char: str) -> bool:
    """Whether a character is only read: neither control, format (but joiners) nor half a pair."""
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs") or char in "\u200c\u200d"


def code_of(char: str) -> str:
    """Return the code point of a character, in brackets."""
    return f"⟨U+{ord(char):04X}⟩"


def render_template(
    file: Path, filters: Mapping[str, Callable[..., object]], **values: object
) -> str:
    """Return a page made of a template of HTML; every text is escaped on the way in.

    Args:
        file: the template; others of its folder may be included.
        filters: by name; `printable` is among them always.
        values: what the template shows.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(file.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters, printable=printable)
    page = environment.get_template(file.name).render(**values)
    # A lone surrogate (half of an emoji, cut by a tokenizer) has no UTF-8 and would end the write.
    return page.encode("utf-8", "replace").decode("utf-8")
