"""Curves over the training step, or over the tokens trained on."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.report.charts.scale import Axis, linear_or_log, nice_axis, thin, tick_label
from pipeline.report.charts.scene import WIDTH, Key, Line, Mark, Scene, columns, labelled_rows
from pipeline.report.charts.styles import style_of
from pipeline.report.data.runs import Curve

__all__ = ["averaged_over", "curves_scene"]

_DENSE_POINTS = 100
"""More logged values than this are a noisy line, fewer are measured points."""


_OVER = {"step": "training step", "tokens": "tokens trained on"}


def curves_scene(
    curves: Sequence[Curve], *, width: float = WIDTH, height: float = 210.0, most: int = 240
) -> Scene:
    """Draw curves of one unit over the training step, or over the tokens trained on.

    Args:
        curves: at least one, all over the same count; of several names, the sparse ones matter
            more than the dense.
        width: of the chart.
        height: of the chart.
        most: points of a line; more are averaged.
    """
    left, right, top, bottom = 46.0, width - 10, 12.0, height - 32
    lines = [(curve, thin(curve.points, most=most)[0]) for curve in curves]
    lines = [(curve, points) for curve, points in lines if points]
    steps = [step for _, points in lines for step, _ in points] or [0.0, 1.0]
    values = [value for _, points in lines for _, value in points] or [0.0, 1.0]
    ticks = nice_axis(steps, start=left, end=right, from_zero=False).ticks
    x = Axis(min(steps), max(max(steps), min(steps) + 1), ticks, left, right)
    learning = curves[0].group == "learning"
    y = linear_or_log(values, start=bottom, end=top, from_zero=not learning, may_log=learning)
    names = list(dict.fromkeys(curve.name for curve in curves))
    several = len(names) > 1
    shapes: list[Line | Mark] = []
    # On top of the others: the best of a sweep, and what matters more.
    for curve, points in sorted(lines, key=lambda line: (_sparse(line[0]), -line[0].rank)):
        style = style_of(curve.kind, curve.rank)
        path = tuple((x.at(step), y.at(value)) for step, value in points)
        if len(path) > 1:
            shapes.append(Line("line", (path,), style, several and not _sparse(curve)))
        if len(path) == 1 or (several and _sparse(curve)):
            size = 4.0 if len(path) == 1 else 2.5
            shapes += [Mark(style, *place, "circle", size) for place in path]
    inside = [(x.at(tick), tick_label(tick)) for tick in ticks if x.low <= tick <= x.high]
    scale = ", logarithmic scale" if y.logarithmic else ""
    shown, unit = " and ".join(names), curves[0].unit
    over = curves[0].over
    return Scene(
        width,
        height,
        heading=f"{shown}, {unit}" if unit else shown,
        title=f"{shown}{f' in {unit}' if unit else ''} by {_OVER[over]}{scale}",
        told="; ".join(_told(curve, points) for curve, points in lines),
        parts=(
            *labelled_rows(y, left=left, right=right),
            *columns(inside, label_y=bottom + 16, name=over, name_x=(left + right) / 2),
            *shapes,
        ),
        legend=tuple(
            Key(
                style_of(curve.kind, curve.rank),
                (f"{curve.name}, " if several else "") + (curve.series or curve.kind),
                several and not _sparse(curve),
            )
            for curve in curves
        ),
    )


def averaged_over(curves: Sequence[Curve]) -> int:
    """Return the most steps that one point is the mean of; 1 if every value is shown."""
    return max((thin(curve.points)[1] for curve in curves), default=1)


def _sparse(curve: Curve) -> bool:
    return len(curve.points) <= _DENSE_POINTS


def _told(curve: Curve, points: Sequence[tuple[float, float]]) -> str:
    (first, start), (last, end) = points[0], points[-1]
    name = curve.series or curve.name
    if curve.over == "tokens":
        return f"{name}: {start:.4g} at {first:.0f} tokens, {end:.4g} at {last:.0f} tokens"
    return f"{name}: {start:.4g} at step {first:.0f}, {end:.4g} at step {last:.0f}"
