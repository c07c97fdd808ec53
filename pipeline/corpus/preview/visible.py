"""Texts of pieces so that all of them can be seen: white space where it matters, control codes."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.corpus.preview.record import Piece
from pipeline.printable import code_of, is_harmless

__all__ = ["visible_texts"]

_MARKS = {"\n": "↵\n", "\t": "→", "\r": "␍"}
_SPACE = "·"


def visible_texts(pieces: Sequence[Piece]) -> list[str]:
    """Return the text to show for each piece.

    A space is shown as a dot where it would not be seen: at a line's or turn's beginning or end,
    beside another, and beside a special token. A newline keeps its line and has a mark.
    """
    whole = "".join(piece.text for piece in pieces)
    borders = _borders(pieces)
    shown, at = [], 0
    for piece in pieces:
        texts = []
        for char in piece.text:
            if char == " ":
                texts.append(_SPACE if _matters(whole, at, borders) else char)
            else:
                texts.append(_MARKS.get(char) or (char if is_harmless(char) else code_of(char)))
            at += 1
        shown.append("".join(texts))
    return shown


def _borders(pieces: Sequence[Piece]) -> frozenset[int]:
    """Return the characters at which a special token or the loss mask begins or ends."""
    found, at, before = {0}, 0, None
    for piece in pieces:
        kind = (piece.special, piece.supervised)
        if before is not None and (kind != before or piece.special):
            found.add(at)
        at += len(piece.text)
        before = kind
    return frozenset({*found, at})


def _matters(text: str, at: int, borders: frozenset[int]) -> bool:
    if at in borders or at + 1 in borders:
        return True
    return text[at - 1].isspace() or text[at + 1].isspace()
