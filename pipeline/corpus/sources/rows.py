"""Raw rows of the sources, each with a stable key and a place for messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from pipeline.errors import CorpusError

__all__ = ["BadRow", "Piece", "Row", "RowSource", "even_pieces"]


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
class Piece:
    """A range of a source that can be read by itself: what preparation is divided by."""

    file: int
    """Number of the file within the source; 0 where there is only a table."""
    start: int
    """The first row group of a Parquet file, byte of JSON Lines, row of a table."""
    stop: int
    """One more than the last, or -1: to the end of the file."""
    first_row: int
    """Number of its first row within the file, where that is known and rows are named by it."""
    rows: int | None
    """Its rows, or None where only reading tells."""
    size: int
    """Bytes, about: what its reading costs."""

    def to_json(self) -> list[int | None]:
        """Return the JSON form."""
        return [self.file, self.start, self.stop, self.first_row, self.rows, self.size]

    @classmethod
    def from_json(cls, data: list[Any]) -> Piece:
        """Read the JSON form."""
        return cls(*data)


def even_pieces(rows: int, held: int, size: int) -> Iterator[Piece]:
    """Divide a table of `rows` rows and `held` bytes evenly, into pieces of about `size` bytes."""
    parts = max(1, min(rows, held // size))
    for start, stop in pairwise([rows * part // parts for part in range(parts + 1)]):
        yield Piece(0, start, stop, start, stop - start, held // parts)


class RowSource(Protocol):
    """Rows in a fixed order, readable in pieces from any process; instances can be pickled."""

    @property
    def name(self) -> str:
        """Identifies the source in sample ids; independent of the machine and of the content."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """A description of the content without reading it: revision, files and their sizes, ..."""
        ...

    @property
    def total(self) -> int | None:
        """Number of rows, or None if only reading tells."""
        ...

    @property
    def mixed(self) -> bool:
        """Whether every row is interpreted by its own columns (embedded text only)."""
        ...

    def pieces(self, size: int) -> Iterator[Piece]:
        """Divide the source into pieces of about `size` bytes, in its order; reads no row.

        Raises:
            CorpusError: a file cannot be read.
        """
        ...

    def read(self, piece: Piece) -> Iterator[Row]:
        """Yield the rows of a piece; the pieces of any division give the same rows.

        Raises:
            CorpusError: the source cannot be read, or ends in the middle.
        """
        ...

    def count(self, piece: Piece, at_most: int) -> int:
        """Return the rows of a piece, or `at_most` where there are more.

        Raises:
            CorpusError: the source cannot be read.
        """
        ...
