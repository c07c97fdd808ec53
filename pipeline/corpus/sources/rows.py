"""Raw rows of the sources, each with a stable key and a place for messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import CorpusError

__all__ = ["BadRow", "Row", "RowSource"]


class BadRow(CorpusError):
    """One row that cannot be used as it is; `--corpus.on_bad_row` decides what follows.

    A reader attaches it to the row (`Row.bad`) instead of raising, so that one row never ends the
    reading of the others; whoever interprets a row raises it.
    """

    def __init__(self, kind: str, found: str, *, expected: str = "", do: str = "") -> None:
        """`kind`: a few words that group rows of the same fault in the report of bad rows."""
        # The message may quote a column or a role that is not Unicode; logs are.
        super().__init__(_escaped(found), expected=_escaped(expected), do=do)
        self.kind = kind


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source, not yet interpreted."""

    key: str
    """Identifies the row within its source; independent of how many rows are read."""
    place: str
    """For messages, as in `chats.jsonl, line 7`."""
    data: Mapping[str, Any]
    """The columns; empty where the row is bad."""
    bad: BadRow | None = None
    """Why the reader could not read this row (a line that is not JSON, text that is not Unicode).
    """


@dataclass(frozen=True, slots=True)
class RowSource:
    """Rows in a fixed order; `rows` can be consumed once."""

    name: str
    """Identifies the source in sample ids; independent of the machine and of the content."""
    rows: Iterator[Row]
    total: int | None
    """Number of rows, or None if only reading tells."""
    identity: dict[str, Any]
    """A description of the content without reading it: revision, files and their sizes, ..."""
    mixed: bool = False
    """Whether every row is interpreted by its own columns (embedded text only)."""
