"""Units: the ranges of a source that are prepared by one process each, cut before any is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.corpus.sources.rows import Piece, Row, RowSource

__all__ = ["Unit", "cut_units", "rows_of"]

_MOST_PIECES = 4096
"""Of one unit, so that a folder of a million tiny files is no unit of a million requests."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive pieces of a source."""

    index: int
    pieces: tuple[Piece, ...]
    limit: int | None = None
    """How many of its rows are read; None: all."""

    @property
    def size(self) -> int:
        """Bytes, about."""
        return sum(piece.size for piece in self.pieces)

    @property
    def rows(self) -> int | None:
        """Its rows, or None where only reading tells."""
        total = 0
        for piece in self.pieces:
            if piece.rows is None:
                return None
            total += piece.rows
        return total if self.limit is None else min(total, self.limit)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"pieces": [piece.to_json() for piece in self.pieces], "limit": self.limit}

    @classmethod
    def from_json(cls, index: int, data: dict[str, Any]) -> Unit:
        """Read the JSON form."""
        return cls(index, tuple(map(Piece.from_json, data["pieces"])), data["limit"])


def cut_units(source: RowSource, *, unit_bytes: int, num_samples: int | None) -> tuple[Unit, ...]:
    """Cut a source into units of about `unit_bytes`, up to the row `num_samples`.

    Where rows are limited and only reading tells where the last one is, the rows before it are
    counted here, by the one process that cuts; lines are not parsed for it.

    Raises:
        CorpusError: a file cannot be read.
    """
    groups = list(_groups(source.pieces(unit_bytes), unit_bytes))
    if num_samples is None:
        return tuple(Unit(index, pieces) for index, pieces in enumerate(groups))
    units: list[Unit] = []
    left = num_samples
    for index, pieces in enumerate(groups):
        if index + 1 < len(groups):
            rows = _count(source, pieces, left)
            if rows < left:
                units.append(Unit(index, pieces))
                left -= rows
                continue
        units.append(Unit(index, pieces, left))
        break
    return tuple(units)


def rows_of(source: RowSource, unit: Unit) -> Iterator[Row]:
    """Yield the rows of a unit.

    Raises:
        CorpusError: the source cannot be read.
    """
    number = 0
    for piece in unit.pieces:
        if number == unit.limit:
            return
        for row in source.read(piece):
            yield row
            number += 1
            if number == unit.limit:
                return


def _groups(pieces: Iterator[Piece], unit_bytes: int) -> Iterator[tuple[Piece, ...]]:
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += piece.size
        if size >= unit_bytes or len(group) == _MOST_PIECES:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def _count(source: RowSource, pieces: Sequence[Piece], at_most: int) -> int:
    count = 0
    for piece in pieces:
        if count < at_most:
            count += source.count(piece, at_most - count)
    return count
