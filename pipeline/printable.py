"""Text as it can be shown: what would act on a page or a terminal, as its code."""

from __future__ import annotations

import unicodedata

__all__ = ["code_of", "is_harmless", "printable"]


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
