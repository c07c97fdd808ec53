"""One measure of several models: a dot each, with whiskers of two standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.charts.scale import nice_axis, tick_label
from pipeline.report.charts.scene import (
    WIDTH,
    Label,
    Line,
    Mark,
    Scene,
    columns,
    cut,
    mark,
    whisker,
)
from pipeline.report.charts.styles import rank_style, style_of
from pipeline.report.data.measures import Measure, Row
from pipeline.report.data.sweep import SweepFacts
from pipeline.report.text.metrics import DISTANCES, Metric, metric_decimals, upper_first
from pipeline.report.text.numbers import format_measure
from pipeline.report.text.sweep_text import objective_metric

__all__ = ["objective_scene", "rows_scene"]

_STEP, _TOP, _BOTTOM = 30.0, 6.0, 26.0
_MOST_OBJECTIVES = 40


@dataclass(frozen=True, slots=True)
class _Dot:
    name: str
    spoken: str
    measure: Measure | None
    style: str


def rows_scene(rows: Sequence[Row], metric: Metric) -> Scene:
    """Draw one metric of each row, top to bottom; one without the metric gets a dash."""
    dots = [
        _Dot(
            # The settings' names would fill the room and leave out their values.
            cut(f"#{row.rank} {row.detail or row.name}" if row.rank else row.name, 17),
            row.name,
            row.metrics.get(metric.key),
            style_of(row.kind, row.rank),
        )
        for row in rows
    ]
    from_zero = metric.key in (*DISTANCES, "ece") and not all(row.rank for row in rows)
    decimals = metric_decimals(metric, rows)
    return _scene(
        dots, metric, metric.heading, decimals=decimals, from_zero=from_zero, width=WIDTH, room=112
    )


def objective_scene(facts: SweepFacts, rows: Sequence[Row], *, width: float) -> Scene | None:
    """Draw the objective of a sweep's runs, the best on top; None where no run has a result."""
    metric = objective_metric(facts)
    dots = [
        _Dot(
            cut(f"#{point.rank} {point.label}", 48)
            + (" *" if point.verdict == "within noise" else ""),
            point.label,
            point.objective,
            rank_style(point.rank),
        )
        for point in facts.ranked[:_MOST_OBJECTIVES]
    ]
    if not dots:
        return None
    heading = upper_first(facts.label) + (f", {facts.unit}" if facts.unit else "")
    if any(point.verdict == "within noise" for point in facts.ranked):
        heading += "    * within noise of the best"
    decimals = metric_decimals(metric, rows)
    return _scene(dots, metric, heading, decimals=decimals, from_zero=False, width=width, room=300)


def _scene(
    dots: Sequence[_Dot],
    metric: Metric,
    heading: str,
    *,
    decimals: int,
    from_zero: bool,
    width: float,
    room: float,
) -> Scene:
    """Draw names up to `room`, dots beside them, values at the right."""
    height = _TOP + _STEP * len(dots) + _BOTTOM
    known = [dot.measure for dot in dots if _is_known(dot.measure)]
    ends = [end for measure in known if measure for end in whisker(measure, metric)] or [0.0, 1.0]
    axis = nice_axis(ends, start=room + 14, end=width - 70, from_zero=from_zero, num_ticks=3)
    ticks = [(axis.at(tick), tick_label(tick)) for tick in axis.ticks]
    grid = tuple(((x, _TOP), (x, height - _BOTTOM)) for x, _ in ticks)
    parts: list[Line | Mark | Label] = [Line("grid", grid), *columns(ticks, label_y=height - 9)]
    told = []
    for place, dot in enumerate(dots):
        y = _TOP + _STEP * (place + 0.5)
        value, error = format_measure(dot.measure, metric, decimals=decimals)
        told.append(f"{dot.spoken}: {value} {error}".strip())
        parts.append(Label("name", room, y + 4, dot.name, "end"))
        parts.append(Label("value", width - 2, y + 4, value, "end"))
        if dot.measure is not None and _is_known(dot.measure):
            low, high = (axis.at(end) for end in whisker(dot.measure, metric))
            if high > low:
                caps = (((end, y - 4), (end, y + 4)) for end in (low, high))
                parts.append(Line("whisker", (((low, y), (high, y)), *caps), dot.style))
            parts.append(mark(dot.style, axis.at(dot.measure.value * metric.scale), y))
    unit = f" in {metric.unit}" if metric.unit else ""
    better = "lower is better" if metric.lower_is_better else "higher is better"
    title = f"{metric.label}{unit}, {better}"
    return Scene(width, height, heading, title, "; ".join(told), tuple(parts))


def _is_known(measure: Measure | None) -> bool:
    return measure is not None and math.isfinite(measure.value)
