"""Numbers as people read them."""

from __future__ import annotations

import math

from pipeline.report.data.measures import Measure
from pipeline.report.text.metrics import Metric

__all__ = [
    "format_bytes",
    "format_count",
    "format_duration",
    "format_measure",
    "format_standard_errors",
]


def format_measure(
    measure: Measure | None, metric: Metric, *, decimals: int | None = None
) -> tuple[str, str]:
    """Return (value, "± error" or "") as shown; a metric that was not measured is a dash."""
    if measure is None or math.isnan(measure.value):
        return "—", ""
    places = metric.decimals if decimals is None else decimals
    value = f"{measure.value * metric.scale:.{places}f}"
    error = measure.standard_error
    if error is None or not math.isfinite(error):
        return value, ""
    return value, f"± {error * metric.scale:.{places}f}"


def format_standard_errors(distance: float) -> str:
    """Return a distance from zero in words, as in "5.1 standard errors"."""
    if math.isinf(distance):
        return "without any measured error"
    return f"{distance:.1f} standard errors" if distance < 10 else f"{distance:.0f} standard errors"


def format_count(value: float) -> str:
    """Return an integer with thin groups below a million, else three digits and a word."""
    for factor, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {word}"
    return f"{value:,.0f}".replace(",", "\u202f")


def format_bytes(value: float) -> str:
    """Return bytes with a binary unit and three digits."""
    for factor, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} bytes"


def format_duration(seconds: float | None) -> str:
    """Return seconds with the unit that a person would choose."""
    if seconds is None or not math.isfinite(seconds):
        return "—"
    for factor, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= factor:
            return f"{seconds / factor:.1f} {unit}"
    return f"{seconds:.0f} s"
