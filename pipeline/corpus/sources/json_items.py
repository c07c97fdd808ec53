"""Read the items of a JSON array one by one, so that any file needs constant memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

from pipeline.corpus.sources.unfit import JSON

__all__ = ["NotAnArray", "json_items"]

_CHUNK = 1 << 20
_TAIL = 64
"""A mistake at least this many characters before the end of the buffer is not caused by the
buffer's end: the decoder reports an incomplete value where it ends, or at the start of a
literal."""
_SPACE = " \t\n\r"


class NotAnArray(Exception):
    """The text does not begin with `[`; no item has been returned."""


def json_items(text: TextIO) -> Iterator[Any]:
    """Yield the items of the array in order; one is in memory at a time.

    Raises:
        NotAnArray: the text is not an array.
        json.JSONDecodeError: a mistake; `lineno` counts from the start of the text. The items
            before it have been returned.
    """
    window = _Window(text)
    if window.next_char() != "[":
        raise NotAnArray
    window.at += 1
    if window.next_char() == "]":
        window.at += 1
    else:
        while True:
            yield window.value()
            separator = window.next_char()
            if separator not in (",", "]"):
                raise window.mistake("Expecting ',' delimiter", window.at)
            window.at += 1
            if separator == "]":
                break
            window.next_char()
    if window.next_char():
        raise window.mistake("Extra data", window.at)


class _Window:
    """A buffer over the text."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self._decode = JSON.raw_decode
        self._buffer = ""
        self._lines = 0
        """Line ends in front of the buffer."""
        self._ended = False
        self.at = 0

    def next_char(self) -> str:
        """Skip white space and return the character there; empty at the end."""
        while True:
            while self.at < len(self._buffer) and self._buffer[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self._buffer):
                return self._buffer[self.at]
            if not self._read():
                return ""

    def value(self) -> Any:
        """Return the value at this place and advance past it."""
        while True:
            try:
                value, end = self._decode(self._buffer, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or (
                    error.pos >= len(self._buffer) - _TAIL
                )
                if cut_off and self._read():
                    continue
                raise self.mistake(error.msg, error.pos) from None
            # At the end of the buffer a number may be incomplete.
            if end == len(self._buffer) and self._read():
                continue
            self.at = end
            return value

    def mistake(self, message: str, at: int) -> json.JSONDecodeError:
        """Return the decoder's error with the line number of the whole text."""
        error = json.JSONDecodeError(message, self._buffer, at)
        error.lineno += self._lines
        return error

    def _read(self) -> bool:
        """Read more, twice as much each time for one value; false at the end."""
        if self._ended:
            return False
        self._lines += self._buffer.count("\n", 0, self.at)
        self._buffer = self._buffer[self.at :]
        self.at = 0
        more = self._text.read(max(_CHUNK, len(self._buffer)))
        self._ended = not more
        self._buffer += more
        return bool(more)
