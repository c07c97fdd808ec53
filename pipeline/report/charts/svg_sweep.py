"""Charts of a sweep: the objective over each swept value, one small chart a field."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from pipeline.report.charts.scale import Axis, log_axis, nice_axis, tick_label
from pipeline.report.charts.svg import WIDTH, rank_class, rank_mark, svg_frame, svg_tag, svg_text
from pipeline.report.data.measures import Measure
from pipeline.report.data.sweep import SweepPoint
from pipeline.report.text.metrics import Metric

__all__ = ["value_chart"]

_Place = Callable[[SweepPoint], float]
_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 220, 50.0, 326.0, 12.0, 180.0
_LOG_ABOVE_RATIO = 20.0
_MOST_NAMES = 6


def value_chart(
    points: Sequence[SweepPoint], field: str, name: str, metric: Metric, *, identity: str
) -> Markup:
    """Draw the objective of each run over its value of one swept field.

    Runs that share all other values are joined, so that the effect of this field alone is seen.

    Args:
        points: with an objective.
        field: the swept field, dotted.
        name: of the field, for people.
        metric: how the objective is shown.
        identity: a prefix that makes the ids inside unique on the page.
    """
    x_of, ticks = _x_axis(points, field)
    ends = [end for p in points for end in _whisker(p.objective, metric)]
    y = nice_axis(ends, start=_BOTTOM, end=_TOP, from_zero=False)
    parts = [_grid(y)]
    for x, label in ticks:
        parts.append(svg_text(x, _BOTTOM + 16, label, "middle", "tick"))
    parts.append(svg_text((_LEFT + _RIGHT) / 2, _BOTTOM + 34, name, "middle", "tick"))
    for group in _same_elsewhere(points, field):
        path = " ".join(f"{x_of(p):.1f},{y.at(_shown(p, metric)):.1f}" for p in group)
        if len(group) > 1:
            parts.append(svg_tag(f'<polyline class="joined" points="{path}"/>'))
    # The best is drawn last, on top of the others.
    for point in sorted(points, key=lambda p: -p.rank):
        x, at = x_of(point), y.at(_shown(point, metric))
        low, high = (y.at(end) for end in _whisker(point.objective, metric))
        kind = rank_class(point.rank)
        if abs(high - low) > 1:
            parts.append(
                svg_tag(f'<path class="whisker {kind}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
            )
        parts.append(rank_mark(point.rank, x, at))
    unit = f" in {metric.unit}" if metric.unit else ""
    told = "; ".join(
        f"#{p.rank} {name} {p.values[field]}: {_shown(p, metric):.{metric.decimals}f}"
        for p in points
    )
    title = f"{metric.label}{unit} by {name}"
    return svg_frame(identity, _HEIGHT, title, told, Markup("").join(parts))


def _x_axis(points: Sequence[SweepPoint], field: str) -> tuple[_Place, list[tuple[float, str]]]:
    """Return where a point goes, and the ticks: by number where all are, else by name."""
    values = [p.values[field] for p in points]
    unique = list(dict.fromkeys(values))
    if all(field in p.numbers for p in points) and len(unique) > 1:
        numbers = [p.numbers[field] for p in points]
        low, high = min(numbers), max(numbers)
        inner = (_LEFT + 16, _RIGHT - 16)
        if low > 0 and high / low >= _LOG_ABOVE_RATIO:
            axis = log_axis(numbers, start=inner[0], end=inner[1])
        else:
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
        [(places[v], _cut(v, room * every)) for v in unique[::every]],
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


def _shown(point: SweepPoint, metric: Metric) -> float:
    assert point.objective is not None
    return point.objective.value * metric.scale


def _whisker(measure: Measure | None, metric: Metric) -> tuple[float, float]:
    assert measure is not None
    error = measure.standard_error
    reach = 2.0 * error if error is not None and math.isfinite(error) else 0.0
    return (measure.value - reach) * metric.scale, (measure.value + reach) * metric.scale


def _grid(axis: Axis) -> Markup:
    parts = []
    for tick in axis.ticks:
        y = axis.at(tick)
        parts.append(svg_tag(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - 10}"/>'))
        parts.append(svg_text(_LEFT - 6, y + 4, tick_label(tick), "end", "tick"))
    return Markup("").join(parts)


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"
