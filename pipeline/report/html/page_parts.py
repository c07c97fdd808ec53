"""The parts of the page's sections: key figures and charts."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from pipeline.report.charts.scene import Key, Scene
from pipeline.report.charts.svg import svg

__all__ = ["Figure", "Tile", "figure"]


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
    legend: tuple[Key, ...]


def figure(scene: Scene, *, identity: str, note: str, with_legend: bool = True) -> Figure:
    """Return a chart for the page; `identity` makes the ids inside unique on it."""
    legend = scene.legend if with_legend else ()
    return Figure(scene.heading, note, svg(scene, identity=identity), legend)
