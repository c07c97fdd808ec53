"""The page's charts as inline SVG: styled by the page's CSS, so that dark mode reaches them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from pipeline.report.charts.scale import Axis, log_axis, nice_axis, thin, tick_label
from pipeline.report.data.measures import Measure, Row
from pipeline.report.data.runs import Curve
from pipeline.report.text.metrics import DISTANCES, Metric, metric_decimals
from pipeline.report.text.numbers import format_measure

__all__ = [
    "RANK_STYLES",
    "WIDTH",
    "averaged_over",
    "curve_class",
    "dot_chart",
    "line_chart",
    "rank_class",
    "rank_mark",
    "svg_frame",
    "svg_tag",
    "svg_text",
]

RANK_STYLES = 8
"""Runs of a sweep with a colour, a dash and a shape of their own; the rest share a grey one."""

WIDTH = 340
"""About a phone's width: the text inside keeps its size there instead of shrinking."""
_NAME_CHARACTERS = 17
_LOG_ABOVE_RATIO = 20.0


def dot_chart(rows: Sequence[Row], metric: Metric, *, identity: str) -> Markup:
    """Draw one metric of each row as a dot with whiskers of two standard errors.

    Args:
        rows: the models, top to bottom; one without the metric gets a dash.
        metric: what is drawn.
        identity: a prefix that makes the ids inside unique on the page.
    """
    step, top, bottom = 30, 6, 26
    height = top + step * len(rows) + bottom
    known = [(row, row.metrics[metric.key]) for row in rows if metric.key in row.metrics]
    known = [(row, measure) for row, measure in known if math.isfinite(measure.value)]
    decimals = metric_decimals(metric, rows)
    ends = [end for _, measure in known for end in _whisker(measure, metric)] or [0.0, 1.0]
    zero = metric.key in (*DISTANCES, "ece") and not all(row.rank for row in rows)
    axis = nice_axis(ends, start=126.0, end=270.0, from_zero=zero, num_ticks=3)
    parts = [_vertical_grid(axis, top=top, bottom=height - bottom, label_y=height - 9)]
    told = []
    for i, row in enumerate(rows):
        y = top + step * i + step / 2
        value, error = format_measure(row.metrics.get(metric.key), metric, decimals=decimals)
        told.append(f"{row.name}: {value} {error}".strip())
        # The settings' names would fill the room and leave out their values.
        shown = f"#{row.rank} {row.detail or row.name}" if row.rank else row.name
        parts.append(svg_text(112, y + 4, _cut(shown), "end", "name"))
        parts.append(svg_text(WIDTH - 2, y + 4, value, "end", "value"))
        if any(row is item for item, _ in known):
            parts.append(_dot(row, row.metrics[metric.key], metric, axis, y))
    unit = f" in {metric.unit}" if metric.unit else ""
    better = "lower is better" if metric.lower_is_better else "higher is better"
    title = f"{metric.label}{unit}, {better}"
    return svg_frame(identity, height, title, "; ".join(told), Markup("").join(parts))


def line_chart(curves: Sequence[Curve], *, identity: str) -> Markup:
    """Draw curves that share a heading over the training step."""
    height, left, right, top, bottom = 210, 46.0, 330.0, 12.0, 178.0
    lines = [(curve, thin(curve.points)[0]) for curve in curves]
    lines = [(curve, points) for curve, points in lines if points]
    steps = [step for _, points in lines for step, _ in points] or [0.0, 1.0]
    values = [value for _, points in lines for _, value in points] or [0.0, 1.0]
    x = nice_axis(steps, start=left, end=right, from_zero=False)
    x = Axis(min(steps), max(max(steps), min(steps) + 1), x.ticks, left, right)
    learning = curves[0].group == "learning"
    if learning and min(values) > 0 and max(values) / min(values) > _LOG_ABOVE_RATIO:
        y = log_axis(values, start=bottom, end=top)
    else:
        y = nice_axis(values, start=bottom, end=top, from_zero=not learning)
    parts = [_horizontal_grid(y, left=left, right=right), _step_labels(x, bottom)]
    told = []
    # The best of a sweep is drawn last, on top of the others.
    for curve, points in sorted(lines, key=lambda line: -line[0].rank):
        path = " ".join(f"{x.at(step):.1f},{y.at(value):.1f}" for step, value in points)
        if len(points) == 1:
            (px, py) = (x.at(points[0][0]), y.at(points[0][1]))
            kind = curve_class(curve)
            parts.append(
                svg_tag(f'<circle class="mark {kind}" cx="{px:.1f}" cy="{py:.1f}" r="4"/>')
            )
        else:
            parts.append(svg_tag(f'<polyline class="line {curve_class(curve)}" points="{path}"/>'))
        told.append(_told(curve, points))
    unit = f" in {curves[0].unit}" if curves[0].unit else ""
    scale = ", logarithmic scale" if y.logarithmic else ""
    title = f"{curves[0].name}{unit} by training step{scale}"
    return svg_frame(identity, height, title, "; ".join(told), Markup("").join(parts))


def curve_class(curve: Curve) -> str:
    """Return the CSS class of a curve: by its place in a sweep, else by the run's role."""
    return rank_class(curve.rank) if curve.rank else curve.kind


def averaged_over(curves: Sequence[Curve]) -> int:
    """Return how many steps one drawn point stands for at most; 1 if every value is drawn."""
    return max((thin(curve.points)[1] for curve in curves), default=1)


def rank_class(rank: int) -> str:
    """Return the CSS class of a run of a sweep."""
    return f"r{min(rank, RANK_STYLES + 1)}"


def rank_mark(rank: int, x: float, y: float) -> Markup:
    """Draw a run of a sweep: a shape for each place, as colour alone must not carry it."""
    kind = f"mark {rank_class(rank)}"
    shapes = {
        1: f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>',
        2: f'<path class="{kind}" d="M{x - 5:.1f} {y - 5:.1f}h10v10h-10z"/>',
        3: f'<path class="{kind}" d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z"/>',
        4: f'<path class="{kind}" d="M{x:.1f} {y - 6:.1f}l6 11h-12z"/>',
        5: f'<path class="{kind}" d="M{x:.1f} {y + 6:.1f}l6 -11h-12z"/>',
        6: f'<path class="{kind} open" d="M{x - 5:.1f} {y - 5:.1f}h10v10h-10z"/>',
        7: f'<path class="{kind} open" d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z"/>',
        8: f'<path class="{kind} open" d="M{x:.1f} {y - 6:.1f}l6 11h-12z"/>',
    }
    other = f'<circle class="{kind} open" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
    return svg_tag(shapes.get(rank, other))


def svg_frame(identity: str, height: float, title: str, description: str, body: Markup) -> Markup:
    """Return a chart with its title and its content in words, for those who hear the page."""
    return Markup(
        '<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{id}-t {id}-d">'
        '<title id="{id}-t">{title}</title><desc id="{id}-d">{description}</desc>{body}</svg>'
    ).format(
        width=WIDTH, height=height, id=identity, title=title, description=description, body=body
    )


def _dot(row: Row, measure: Measure, metric: Metric, axis: Axis, y: float) -> Markup:
    low, high = (axis.at(end) for end in _whisker(measure, metric))
    x = axis.at(measure.value * metric.scale)
    parts = []
    kind = rank_class(row.rank) if row.rank else row.kind
    if high - low > 0:
        parts.append(f'<path class="whisker {kind}" d="M{low:.1f} {y}H{high:.1f}')
        parts.append(f'M{low:.1f} {y - 4}v8M{high:.1f} {y - 4}v8"/>')
    if row.rank:
        return svg_tag("".join(parts)) + rank_mark(row.rank, x, y)
    # A shape of its own for each role: colour alone must not carry the meaning.
    shape = {
        "before": f'<circle class="mark before" cx="{x:.1f}" cy="{y}" r="5"/>',
        "control": f'<path class="mark control" d="M{x - 5:.1f} {y - 5}h10v10h-10z"/>',
        "distilled": f'<circle class="mark distilled" cx="{x:.1f}" cy="{y}" r="6"/>',
        "teacher": f'<path class="mark teacher" d="M{x:.1f} {y - 7}l7 7l-7 7l-7 -7z"/>',
    }
    return svg_tag("".join([*parts, shape[row.kind]]))


def _whisker(measure: Measure, metric: Metric) -> tuple[float, float]:
    error = measure.standard_error
    reach = 2.0 * error if error is not None and math.isfinite(error) else 0.0
    return (measure.value - reach) * metric.scale, (measure.value + reach) * metric.scale


def _vertical_grid(axis: Axis, *, top: float, bottom: float, label_y: float) -> Markup:
    parts = []
    for tick in axis.ticks:
        x = axis.at(tick)
        parts.append(svg_tag(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>'))
        parts.append(svg_text(x, label_y, tick_label(tick), "middle", "tick"))
    return Markup("").join(parts)


def _horizontal_grid(axis: Axis, *, left: float, right: float) -> Markup:
    parts = []
    for tick in axis.ticks:
        y = axis.at(tick)
        parts.append(svg_tag(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>'))
        parts.append(svg_text(left - 6, y + 4, tick_label(tick), "end", "tick"))
    return Markup("").join(parts)


def _step_labels(axis: Axis, bottom: float) -> Markup:
    inside = [tick for tick in axis.ticks if axis.low <= tick <= axis.high]
    parts = [
        svg_text(axis.at(tick), bottom + 16, tick_label(tick), "middle", "tick") for tick in inside
    ]
    parts.append(svg_text((axis.start + axis.end) / 2, bottom + 30, "step", "middle", "tick"))
    return Markup("").join(parts)


def _told(curve: Curve, points: list[tuple[float, float]]) -> str:
    (first, start), (last, end) = points[0], points[-1]
    name = curve.series or curve.name
    return f"{name}: {start:.4g} at step {first:.0f}, {end:.4g} at step {last:.0f}"


def svg_text(x: float, y: float, text: str, anchor: str, kind: str) -> Markup:
    """Return a text element; `text` is escaped."""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, text
    )


def svg_tag(markup: str) -> Markup:
    """Return our own markup as it is."""
    # Only numbers and our own class names go into these strings; text goes through svg_text.
    return Markup(markup)


def _cut(text: str) -> str:
    return text if len(text) <= _NAME_CHARACTERS else text[: _NAME_CHARACTERS - 1] + "…"
