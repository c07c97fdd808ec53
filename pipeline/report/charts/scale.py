"""Axes of the charts: round ticks, their labels, and fewer points where a line has too many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Axis", "linear_or_log", "log_axis", "nice_axis", "thin", "tick_label"]

_LOG_ABOVE_RATIO = 20.0
"""Positive values further apart than this are read better on a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A value range on a pixel range."""

    low: float
    high: float
    ticks: tuple[float, ...]
    start: float
    """Pixel of `low`."""
    end: float
    """Pixel of `high`."""
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of `value`."""
        low, high, x = self.low, self.high, value
        if self.logarithmic:
            low, high, x = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (x - low) / (high - low) * (self.end - self.start)


def nice_axis(
    values: Sequence[float], *, start: float, end: float, from_zero: bool, num_ticks: int = 4
) -> Axis:
    """Return a linear axis that holds `values`, with ticks of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        spread = abs(high) * 0.1 or 1.0
        low, high = (
            (low, high + spread) if from_zero and low == 0.0 else (low - spread, high + spread)
        )
    step = _nice_step((high - low) / num_ticks)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(i * step for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks, start, end)


def linear_or_log(
    values: Sequence[float], *, start: float, end: float, from_zero: bool, may_log: bool = True
) -> Axis:
    """Return a logarithmic axis for positive values that are far apart, else a linear one."""
    if may_log and min(values) > 0 and max(values) / min(values) > _LOG_ABOVE_RATIO:
        return log_axis(values, start=start, end=end)
    return nice_axis(values, start=start, end=end, from_zero=from_zero)


def log_axis(values: Sequence[float], *, start: float, end: float) -> Axis:
    """Return a logarithmic axis for positive `values`, with ticks at 1, 2 and 5 of each decade."""
    low, high = min(values), max(values)
    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high))
    marks = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    below = max(mark for mark in marks if mark <= low * (1 + 1e-9))
    above = min(mark for mark in marks if mark >= high * (1 - 1e-9))
    inside = [mark for mark in marks if below <= mark <= above]
    # More than two decades of 1-2-5 crowd a small chart: the powers of ten are enough then.
    if len(inside) > 7:
        powers = [m for m in inside if abs(math.log10(m) - round(math.log10(m))) < 1e-9]
        inside = powers if len(powers) >= 2 else inside
    return Axis(below, above, tuple(inside), start, end, logarithmic=True)


def thin(
    points: Sequence[tuple[int, float]], *, most: int = 240
) -> tuple[list[tuple[float, float]], int]:
    """Return at most `most` points, each the mean of so many neighbours, and that number."""
    finite = [(float(step), value) for step, value in points if math.isfinite(value)]
    size = max(math.ceil(len(finite) / most), 1)
    if size == 1:
        return finite, 1
    groups = [finite[i : i + size] for i in range(0, len(finite), size)]
    means = [
        (sum(step for step, _ in group) / len(group), sum(value for _, value in group) / len(group))
        for group in groups
    ]
    return means, size


def tick_label(value: float) -> str:
    """Return a short label: `0.05`, `1.5`, `20k`, `3M`."""
    size = abs(value)
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            scale = 1e3 if suffix == "k" else factor
            return f"{value / scale:.4g}{suffix}"
    if size < 1e-12:
        return "0"
    return f"{value:.4g}"


def _nice_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    for factor in (1.0, 2.0, 5.0, 10.0):
        if raw <= factor * power * (1 + 1e-9):
            return factor * power
    raise AssertionError(f"no step for {raw}")
