"""What a preview holds: rows with their tokens, what was detected, counts, and what is suspicious.

Shapes: L tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.sample import SplitName

__all__ = ["Fact", "Finding", "Part", "Piece", "Preview", "RowView", "Totals"]

Outcome = Literal["used", "quarantined", "dropped"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens that have a text together: one, or as many as share a character."""

    text: str
    ids: tuple[int, ...]
    supervised: bool
    special: bool
    """Whether it is a named token of the tokenizer, such as `<|im_end|>`."""


@dataclass(frozen=True, slots=True)
class Part:
    """A sample of a row, and what was cut off beside it."""

    sample_id: str
    number: int
    """0, or the number of the piece of a row that was split."""
    input_ids_L: NDArray[np.int32] = field(repr=False)
    loss_mask_L: NDArray[np.bool_] = field(repr=False)
    pieces: tuple[Piece, ...] = field(repr=False)
    lost_before: int
    """Tokens of the row that were cut off before it."""
    lost_after: int
    lost_supervised: int
    """Of both, those that would have been supervised."""

    @property
    def supervised(self) -> int:
        """Supervised tokens."""
        return int(self.loss_mask_L.sum())


@dataclass(frozen=True, slots=True)
class RowView:
    """One row of the source, and what became of it."""

    number: int
    """From 0, in the order of the source."""
    place: str
    outcome: Outcome
    reason: str
    """Of a row that is not used, and what to do; else empty."""
    split: SplitName
    tokens: int
    """Before anything is cut."""
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that was detected or chosen, and why."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Something suspicious, and what to do about it; a line."""

    found: str
    do: str

    def __str__(self) -> str:
        """Return both, as one line."""
        return f"{self.found}: {self.do}"


@dataclass(slots=True)
class Totals:
    """Sums over the first rows of the source."""

    rows: int = 0
    used: int = 0
    samples: int = 0
    heldout_rows: int = 0
    tokens: int = 0
    """Of the samples."""
    loss_tokens: int = 0
    turns: int = 0
    unended: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """What was cut and dropped, by the fields of `CorpusCounts`."""
    quarantined: dict[str, int] = field(default_factory=dict)
    """Rows by kind of fault."""
    notes: dict[str, int] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    """Tokens of each row that has any, before anything is cut."""
    is_all: bool = False
    """Whether the source has no more rows."""
    is_settled: bool = False
    """Whether the rows that follow cannot change the split of these."""

    @property
    def bad(self) -> int:
        """Quarantined rows."""
        return sum(self.quarantined.values())


@dataclass(frozen=True, slots=True)
class Preview:
    """All of it."""

    name: str
    """Of the data set."""
    longest: int
    """Tokens after which a row is cut (`max_length`, or the room for a prompt)."""
    is_prompts: bool
    """Whether the teacher writes the answers, so that nothing is supervised yet."""
    facts: tuple[Fact, ...]
    totals: Totals
    findings: tuple[Finding, ...]
    rows: tuple[RowView, ...]
    missing: tuple[str, ...]
    """Kinds of rows that were asked for and are not among the first rows."""
