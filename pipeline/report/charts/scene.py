"""A chart as data: lines, marks and labels at places, with styles instead of colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.report.charts.scale import Axis, tick_label
from pipeline.report.charts.styles import STYLES, Shape
from pipeline.report.data.measures import Measure
from pipeline.report.text.metrics import Metric

__all__ = [
    "WIDTH",
    "Key",
    "Label",
    "Line",
    "Mark",
    "Point",
    "Scene",
    "columns",
    "cut",
    "labelled_rows",
    "mark",
    "outline",
    "whisker",
]

WIDTH = 340.0
"""About a phone's width: the text inside keeps its size there instead of shrinking."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """Strokes of one kind; a gap between two of them."""

    kind: Literal["grid", "joined", "line", "whisker"]
    strokes: tuple[tuple[Point, ...], ...]
    style: str = ""
    pale: bool = False
    """Behind others that matter more."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One value."""

    style: str
    x: float
    y: float
    shape: Shape
    size: float
    open: bool = False


@dataclass(frozen=True, slots=True)
class Label:
    """A text; `y` is its baseline."""

    kind: Literal["name", "tick", "value"]
    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "middle"


@dataclass(frozen=True, slots=True)
class Key:
    """A line of a legend."""

    style: str
    label: str
    pale: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """A chart, and its content in words for those who hear the page."""

    width: float
    height: float
    heading: str
    """Above it, for those who see it."""
    title: str
    told: str
    parts: tuple[Line | Mark | Label, ...]
    """From back to front."""
    legend: tuple[Key, ...] = ()


def mark(style: str, x: float, y: float) -> Mark:
    """Return the mark of a run: a shape of its own, as colour alone must not carry it."""
    look = STYLES[style]
    return Mark(style, x, y, look.shape, look.size, look.open)


def outline(found: Mark) -> tuple[Point, ...]:
    """Return the corners of a mark; none of a circle."""
    x, y, size = found.x, found.y, found.size
    below, above = size - 1, size
    corners: dict[Shape, tuple[Point, ...]] = {
        "circle": (),
        "square": ((-size, -size), (size, -size), (size, size), (-size, size)),
        "diamond": ((0, -size), (size, 0), (0, size), (-size, 0)),
        "up": ((0, -above), (size, below), (-size, below)),
        "down": ((0, above), (size, -below), (-size, -below)),
    }
    return tuple((x + dx, y + dy) for dx, dy in corners[found.shape])


def whisker(measure: Measure, metric: Metric) -> tuple[float, float]:
    """Return the ends of two standard errors about a value, as shown."""
    error = measure.standard_error
    reach = 2.0 * error if error is not None and math.isfinite(error) else 0.0
    return (measure.value - reach) * metric.scale, (measure.value + reach) * metric.scale


def labelled_rows(axis: Axis, *, left: float, right: float) -> tuple[Line | Label, ...]:
    """Return the grid of a vertical axis with its ticks on the left."""
    places = [(axis.at(tick), tick_label(tick)) for tick in axis.ticks]
    return (
        Line("grid", tuple(((left, y), (right, y)) for y, _ in places)),
        *(Label("tick", left - 6, y + 4, text, "end") for y, text in places),
    )


def columns(
    places: Sequence[tuple[float, str]], *, label_y: float, name: str = "", name_x: float = 0.0
) -> tuple[Label, ...]:
    """Return the ticks of a horizontal axis, and its name below them."""
    ticks = tuple(Label("tick", x, label_y, text) for x, text in places)
    return (*ticks, Label("tick", name_x, label_y + 14, name)) if name else ticks


def cut(text: str, room: int) -> str:
    """Return a text of at most `room` characters."""
    return text if len(text) <= room else text[: room - 1] + "…"
