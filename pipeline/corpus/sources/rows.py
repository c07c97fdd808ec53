"""Raw rows of the sources, each with a stable key and a place for messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Row", "RowSource"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source, not yet interpreted."""

    key: str
    """Identifies the row within its source; independent of how many rows are read."""
    place: str
    """For messages, as in `chats.jsonl, line 7`."""
    data: Mapping[str, Any]


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
