"""A sweep's objective over each swept value, one small chart a field."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pipeline.report.charts.scale import Axis, linear_or_log, nice_axis, tick_label
from pipeline.report.charts.scene import (
    WIDTH,
    Line,
    Mark,
    Scene,
    columns,
    cut,
    labelled_rows,
    mark,
    whisker,
)
from pipeline.report.charts.styles import rank_style
from pipeline.report.data.measures import Measure
from pipeline.report.data.sweep import SweepFacts, SweepPoint
from pipeline.report.text.metrics import upper_first
from pipeline.report.text.sweep_text import objective_metric

__all__ = ["value_scene"]

_Place = Callable[[SweepPoint], float]
_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 220.0, 50.0, 326.0, 12.0, 180.0
_MOST_NAMES = 6


def value_scene(facts: SweepFacts, field: str, name: str) -> Scene:
    """Draw the objective of each run over its value of one swept field.

    Runs that share all other values are joined, so that the effect of this field alone is seen.

    Args:
        facts: at least one run of it has a result.
        field: the swept field, dotted.
        name: of the field, for people.
    """
    points, metric = facts.ranked, objective_metric(facts)
    x_of, ticks = _x_axis(points, field)
    ends = [end for p in points for end in whisker(_objective(p), metric)]
    y = nice_axis(ends, start=_BOTTOM, end=_TOP, from_zero=False)

    def at(point: SweepPoint) -> tuple[float, float]:
        return x_of(point), y.at(_objective(point).value * metric.scale)

    joined = [Line("joined", (tuple(map(at, group)),)) for group in _same_elsewhere(points, field)]
    shapes: list[Line | Mark] = [line for line in joined if len(line.strokes[0]) > 1]
    # The best on top of the others.
    for point in sorted(points, key=lambda p: -p.rank):
        x, middle = at(point)
        low, high = (y.at(end) for end in whisker(_objective(point), metric))
        style = rank_style(point.rank)
        if abs(high - low) > 1:
            shapes.append(Line("whisker", (((x, low), (x, high)),), style))
        shapes.append(mark(style, x, middle))
    unit = f" in {metric.unit}" if metric.unit else ""
    shown = [f"{_objective(p).value * metric.scale:.{metric.decimals}f}" for p in points]
    return Scene(
        WIDTH,
        _HEIGHT,
        heading=f"{upper_first(facts.label)} by {name}" + (f", {facts.unit}" if facts.unit else ""),
        title=f"{metric.label}{unit} by {name}",
        told="; ".join(
            f"#{p.rank} {name} {p.values[field]}: {value}"
            for p, value in zip(points, shown, strict=True)
        ),
        parts=(
            *labelled_rows(y, left=_LEFT, right=WIDTH - 10),
            *columns(ticks, label_y=_BOTTOM + 16, name=name, name_x=(_LEFT + _RIGHT) / 2),
            *shapes,
        ),
    )


def _x_axis(points: Sequence[SweepPoint], field: str) -> tuple[_Place, list[tuple[float, str]]]:
    """Return where a point goes, and the ticks: by number where all are, else by name."""
    values = [p.values[field] for p in points]
    unique = list(dict.fromkeys(values))
    if all(field in p.numbers for p in points) and len(unique) > 1:
        numbers = [p.numbers[field] for p in points]
        low, high = min(numbers), max(numbers)
        inner = (_LEFT + 16, _RIGHT - 16)
        axis = linear_or_log(numbers, start=inner[0], end=inner[1], from_zero=False)
        if not axis.logarithmic:
            axis = Axis(low, high, (), *inner)
        known = sorted(set(numbers))
        marks = known if len(known) <= _MOST_NAMES else list(_spread(axis, low, high))
        return (
            lambda p: axis.at(p.numbers[field]),
            [(axis.at(mark), tick_label(mark)) for mark in marks],
        )
    step = (_RIGHT - _LEFT) / len(unique)
    places = {value: _LEFT + step * (i + 0.5) for i, value in enumerate(unique)}
    room = max(3, int(step / 6.2))
    every = max(1, math.ceil(len(unique) / 12))
    return (
        lambda p: places[p.values[field]],
        [(places[v], cut(v, room * every)) for v in unique[::every]],
    )


def _spread(axis: Axis, low: float, high: float) -> Sequence[float]:
    if axis.ticks:
        return [tick for tick in axis.ticks if low <= tick <= high] or [low, high]
    return [low + (high - low) * i / 4 for i in range(5)]


def _same_elsewhere(points: Sequence[SweepPoint], field: str) -> list[list[SweepPoint]]:
    groups: dict[tuple[tuple[str, str], ...], list[SweepPoint]] = {}
    for point in points:
        others = tuple((name, value) for name, value in point.values.items() if name != field)
        groups.setdefault(others, []).append(point)
    return [
        sorted(group, key=lambda p: (p.numbers.get(field, 0.0), p.values[field]))
        for group in groups.values()
    ]


def _objective(point: SweepPoint) -> Measure:
    assert point.objective is not None
    return point.objective
