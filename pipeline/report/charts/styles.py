"""The look of each run: its colours in light and dark, its dash, its shape; for page and PNGs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["RANK_STYLES", "STYLES", "Shape", "Style", "rank_style", "style_of"]

Shape = Literal["circle", "square", "diamond", "up", "down"]


@dataclass(frozen=True, slots=True)
class Style:
    """How one run looks: never told apart by colour alone."""

    light: str
    dark: str
    shape: Shape
    size: float
    """From the middle of the mark to its edge."""
    open: bool = False
    """A mark that is an outline."""
    dash: tuple[float, ...] = ()
    width: float = 1.9
    """Of a line."""


# Okabe and Ito's palette, told apart with every common colour blindness, and what fits beside it.
STYLES: dict[str, Style] = {
    "distilled": Style("#0072b2", "#56b4e9", "circle", 6),
    "control": Style("#d55e00", "#e69f00", "square", 5, dash=(6, 4)),
    "dense": Style("#a34e87", "#d98cc0", "up", 6, dash=(2, 3)),
    "before": Style("#6c7580", "#9ea9b5", "circle", 5, open=True, dash=(1.5, 4)),
    "teacher": Style("#00805d", "#2cc295", "diamond", 7, dash=(9, 3, 2, 3)),
    "r1": Style("#0072b2", "#56b4e9", "circle", 6, width=2.6),
    "r2": Style("#c25000", "#f08a3c", "square", 5, dash=(7, 4)),
    "r3": Style("#00805d", "#2cc295", "diamond", 7, dash=(2, 3.5)),
    "r4": Style("#a34e87", "#d98cc0", "up", 6, dash=(9, 3, 2, 3)),
    "r5": Style("#7a6a00", "#d9c84a", "down", 6, dash=(12, 4)),
    "r6": Style("#1a6f8f", "#6fd0e6", "square", 5, open=True, dash=(4, 2)),
    "r7": Style("#59636e", "#9ea9b5", "diamond", 7, open=True, dash=(9, 3, 2, 3, 2, 3)),
    "r8": Style("#1a1f26", "#e7ebef", "up", 6, open=True, dash=(1.5, 5)),
    "r9": Style("#aab3bc", "#55606c", "circle", 3.5, open=True, width=1.1),
}
"""By role, and in a sweep by place; all places after the eighth share the last."""

RANK_STYLES = 8
"""Runs of a sweep with a colour, a dash and a shape of their own."""


def rank_style(rank: int) -> str:
    """Return the style of a run of a sweep."""
    return f"r{min(rank, RANK_STYLES + 1)}"


def style_of(kind: str, rank: int) -> str:
    """Return the style of a run: by its place in a sweep, else by its role."""
    return rank_style(rank) if rank else kind
