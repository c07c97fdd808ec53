"""Counts of rows by their length in tokens, for a histogram with the line of `max_length`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Bin", "histogram", "length_summary"]


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows of `first` to `last` tokens."""

    first: int
    last: int
    rows: int
    is_beyond: bool
    """Whether they are longer than `max_length`."""


def histogram(lengths: Sequence[int], longest: int) -> list[Bin]:
    """Return bins that double in width, divided at `longest`; none without a row."""
    if not lengths:
        return []
    edges = {longest + 1}
    edge = 1
    while edge <= max(lengths):
        edges.add(edge)
        edge *= 2
    # The last bin ends where the next power does, beyond the longest row.
    ordered = sorted({*edges, edge})
    bins = [
        Bin(first, following - 1, sum(first <= n < following for n in lengths), first > longest)
        for first, following in pairwise(ordered)
    ]
    filled = [number for number, found in enumerate(bins) if found.rows]
    return bins[filled[0] : filled[-1] + 1] if filled else []


def length_summary(lengths: Sequence[int]) -> str:
    """Describe the lengths in one line."""
    if not lengths:
        return "no tokens"
    ordered = sorted(lengths)

    def at(share: float) -> int:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    mean = sum(ordered) / len(ordered)
    return (
        f"{ordered[0]} to {ordered[-1]} tokens a row, {mean:.0f} on average; half have up to "
        f"{at(0.5)}, 95 % up to {at(0.95)}"
    )
