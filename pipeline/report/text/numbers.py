"""Numbers as people read them."""

from __future__ import annotations

import math

from pipeline.amounts import error_decimals, value_decimals
from pipeline.report.data.measures import Measure
from pipeline.report.text.metrics import Metric

__all__ = [
    "difference_decimals",
    "format_count",
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


def difference_decimals(value: float, error: float | None, metric: Metric) -> int:
    """Return the decimals of a difference in a sentence, never so few that it reads as 0.

    One digit of the error (as shown, in the metric's scale), which is one less than in a table; the
    metric's own decimals where no error is known.
    """
    usable = error is not None and math.isfinite(error) and error > 0
    places = max(error_decimals(error) - 1, 0) if usable and error else metric.decimals
    return max(places, value_decimals(value) - 1)


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
