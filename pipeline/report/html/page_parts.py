"""What the page's sections are made of: key figures and charts."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

__all__ = ["Figure", "Tile"]


@dataclass(frozen=True, slots=True)
class Tile:
    """One key figure of the header."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, slots=True)
class Figure:
    """One chart with its heading, legend and remark."""

    heading: str
    note: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()
    """(class, series), if there is more than one line."""
