"""Numbers as people read them, and the plain sentences that say what they mean."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.report.data.records import Difference, Measure, Report, Row

__all__ = [
    "METRICS",
    "Metric",
    "certainty",
    "difference_sentence",
    "format_bytes",
    "format_count",
    "format_duration",
    "format_measure",
    "headline",
    "metric_decimals",
    "shown_metrics",
]


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is named and shown."""

    key: str
    label: str
    unit: str
    lower_is_better: bool
    percent: bool = False
    decimals: int = 3
    explanation: str = ""

    @property
    def scale(self) -> float:
        """What a stored value is multiplied by to be shown."""
        return 100.0 if self.percent else 1.0


METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric(
            "kl", "KL to the teacher", "nats", True,
            explanation="how far the model's next-token distribution is from the teacher's",
        ),
        Metric(
            "uld", "ULD to the teacher", "", True,
            explanation="how far the sorted next-token probabilities are from the teacher's, where "
            "the two have other tokens",
        ),
        Metric(
            "cross_entropy", "Cross-entropy", "nats", True,
            explanation="surprise at the text itself",
        ),
        Metric(
            "perplexity", "Perplexity", "", True, decimals=2,
            explanation="exponential of the cross-entropy",
        ),
        Metric(
            "top1_agreement", "Top-1 agreement", "%", False, percent=True, decimals=1,
            explanation="how often the model's first choice is the teacher's",
        ),
        Metric(
            "ece", "Calibration error", "%", True, percent=True, decimals=2,
            explanation="gap between the model's confidence and how often it is right",
        ),
    )
}  # fmt: skip
"""The metrics a row may hold, in the order they are shown."""


def shown_metrics(rows: Iterable[Row]) -> list[Metric]:
    """Return the metrics that at least one row has, in the order of `METRICS`."""
    present = {key for row in rows for key in row.metrics}
    return [metric for metric in METRICS.values() if metric.key in present]


def metric_decimals(metric: Metric, rows: Iterable[Row]) -> int:
    """Return one number of decimals for a column: two digits of its smallest standard error."""
    errors = [
        measure.standard_error * metric.scale
        for row in rows
        if (measure := row.metrics.get(metric.key)) is not None and measure.standard_error
    ]
    errors = [error for error in errors if math.isfinite(error) and error > 0]
    return _error_decimals(min(errors)) if errors else metric.decimals


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
            f"{_upper(a)} and {b} differ by {size} in {_lower(metric.label)}; no standard error "
            "was measured, so this may be noise."
        )
    if not difference.clear:
        return (
            f"{_upper(a)} and {b} cannot be told apart in {_lower(metric.label)}: they differ by "
            f"{size}, {_errors(distance)}, which is within noise."
        )
    sure = certainty(difference)
    better = (difference.value < 0) == metric.lower_is_better
    if difference.metric == "kl":
        comparison = f"{size} {'closer to' if better else 'further from'} the teacher than {b}"
        return f"{_upper(a)} is {comparison} ({sure})."
    direction = "lower" if difference.value < 0 else "higher"
    verdict = "better" if better else "worse"
    return (
        f"{_upper(a)} has a {_lower(metric.label)} {size} {direction} than {b}, "
        f"which is {verdict} ({sure})."
    )


def certainty(difference: Difference | None) -> str:
    """Return how sure a difference is, as in "5.1 standard errors, paired over the same tokens"."""
    distance = None if difference is None else difference.standard_errors
    if difference is None or distance is None:
        return "no standard error"
    return _errors(distance) + (", paired over the same tokens" if difference.paired else "")


def headline(report: Report) -> str:
    """Return the one-sentence answer: the report's own, or the one its numbers give."""
    if report.summary:
        return report.summary
    if report.sweep is not None:
        from pipeline.report.text.sweep_text import sweep_headline

        return sweep_headline(report.sweep)
    difference = _main_difference(report)
    if difference is None:
        return "This report compares no two models."
    return difference_sentence(difference, report.rows)


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


def _main_difference(report: Report) -> Difference | None:
    """Return distilled against control in KL, then against the student before, measured first."""
    kinds = {row.name: row.kind for row in report.rows}
    distilled = next((row for row in report.rows if row.kind == "distilled"), None)
    if distilled is None:
        return None
    for other in ("control", "before"):
        for difference in report.differences:
            pair = (difference.a, kinds.get(difference.b))
            if difference.metric == "kl" and pair == (distilled.name, other):
                return difference
        rival = next((row for row in report.rows if row.kind == other), None)
        if rival is not None and "kl" in rival.metrics and "kl" in distilled.metrics:
            return _unpaired(distilled, rival)
    return None


def _unpaired(a: Row, b: Row) -> Difference:
    first, second = a.metrics["kl"], b.metrics["kl"]
    error = None
    if first.standard_error is not None and second.standard_error is not None:
        error = math.hypot(first.standard_error, second.standard_error)
    return Difference(a.name, b.name, "kl", first.value - second.value, error, paired=False)


_ROLES = {
    "before": "the student before training",
    "control": "the cross-entropy control",
    "distilled": "the distilled student",
    "teacher": "the teacher",
}


def _called(name: str, rows: tuple[Row, ...]) -> str:
    """Return the role in words where one row plays it, else (a sweep) the row's own name."""
    kind = next((row.kind for row in rows if row.name == name), None)
    alone = sum(row.kind == kind for row in rows) == 1
    return _ROLES[kind] if kind is not None and alone else name


def _size(difference: Difference, metric: Metric) -> str:
    size = abs(difference.value) * metric.scale
    error = difference.standard_error
    usable = error is not None and math.isfinite(error) and error > 0
    # One digit of the error less than in the table: a sentence is for reading.
    places = max(_error_decimals(error * metric.scale) - 1, 0) if usable and error else None
    places = metric.decimals if places is None else places
    unit = "percentage points" if metric.percent else metric.unit
    return f"{size:.{places}f} {unit}".rstrip()


def _errors(distance: float) -> str:
    if math.isinf(distance):
        return "without any measured error"
    return f"{distance:.1f} standard errors" if distance < 10 else f"{distance:.0f} standard errors"


def _error_decimals(error: float) -> int:
    return min(max(1 - math.floor(math.log10(error)), 0), 4)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lower(label: str) -> str:
    # "KL to the teacher" keeps its capitals, "Cross-entropy" loses one.
    return label if label[:2].isupper() else label[:1].lower() + label[1:]
