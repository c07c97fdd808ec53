"""One difference between two models as a plain sentence: how large, which way, how sure."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.report.data.measures import CLEAR_STANDARD_ERRORS, Difference, Row
from pipeline.report.text.metrics import (
    DISTANCES,
    METRICS,
    Metric,
    lower_first,
    upper_first,
)
from pipeline.report.text.numbers import difference_decimals, format_standard_errors

__all__ = ["NOISE_LIMIT", "certainty", "difference_sentence"]

NOISE_LIMIT = f"more than {CLEAR_STANDARD_ERRORS:g} would be clear"
"""Said wherever a difference is called noise: 2.8 standard errors are much to some."""

_ROLES = {
    "before": "the student before training",
    "control": "the cross-entropy control",
    "dense": "the dense student",
    "distilled": "the distilled student",
    "teacher": "the teacher",
}


def difference_sentence(difference: Difference, rows: Iterable[Row]) -> str:
    """Say one difference in plain words, and how sure it is."""
    listed = tuple(rows)
    metric = METRICS.get(difference.metric)
    if metric is None:
        metric = Metric(difference.metric, difference.metric, "", True)
    a, b = (_called(name, listed) for name in (difference.a, difference.b))
    distance = difference.standard_errors
    size = _size(difference, metric)
    if distance is None:
        return (
            f"{upper_first(a)} and {b} differ by {size} in {lower_first(metric.label)}; no "
            "standard error was measured, so this may be noise."
        )
    if not difference.clear:
        return (
            f"{upper_first(a)} and {b} cannot be told apart in {lower_first(metric.label)}: they "
            f"differ by {size}, which is within noise ({format_standard_errors(distance)}; "
            f"{NOISE_LIMIT})."
        )
    sure = certainty(difference)
    better = (difference.value < 0) == metric.lower_is_better
    if metric.key in DISTANCES:
        which = "" if metric.key == "kl" else f" ({metric.short})"
        closer = "closer to" if better else "further from"
        return f"{upper_first(a)} is {size} {closer} the teacher{which} than {b} ({sure})."
    direction = "lower" if difference.value < 0 else "higher"
    verdict = "better" if better else "worse"
    label = lower_first(metric.label)
    article = "an" if label[:1] in "aeio" else "a"
    return (
        f"{upper_first(a)} has {article} {label} {size} {direction} than {b}, "
        f"which is {verdict} ({sure})."
    )


def certainty(difference: Difference | None) -> str:
    """Return how sure a difference is, as in "5.1 standard errors, paired over the same tokens"."""
    distance = None if difference is None else difference.standard_errors
    if difference is None or distance is None:
        return "no standard error"
    paired = ", paired over the same tokens" if difference.paired else ""
    return format_standard_errors(distance) + paired


def _called(name: str, rows: tuple[Row, ...]) -> str:
    """Return the role in words where one row plays it, else (a sweep) the row's own name."""
    kind = next((row.kind for row in rows if row.name == name), None)
    alone = sum(row.kind == kind for row in rows) == 1
    return _ROLES[kind] if kind is not None and alone else name


def _size(difference: Difference, metric: Metric) -> str:
    size = abs(difference.value) * metric.scale
    error = difference.standard_error
    places = difference_decimals(size, None if error is None else error * metric.scale, metric)
    unit = "percentage points" if metric.percent else metric.unit
    return f"{size:.{places}f} {unit}".rstrip()
