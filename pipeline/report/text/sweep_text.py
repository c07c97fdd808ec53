"""A sweep in plain sentences: which setting, by how much, and whether to believe it."""

from __future__ import annotations

import math

from pipeline.report.data.measures import Difference, Measure
from pipeline.report.data.sweep import SweepFacts, SweepPoint
from pipeline.report.text.metrics import METRICS, Metric
from pipeline.report.text.numbers import difference_decimals, format_standard_errors
from pipeline.report.text.sentences import NOISE_LIMIT, certainty

__all__ = ["objective_metric", "objective_text", "sweep_headline", "verdict_text"]


def objective_metric(facts: SweepFacts) -> Metric:
    """Return how the objective is shown; a metric of the training log gets a plain wording."""
    known = METRICS.get(facts.objective.removeprefix("heldout/"))
    if facts.objective.startswith("heldout/") and known is not None:
        return known
    return Metric(facts.objective, facts.label, facts.unit, not facts.maximize, decimals=4)


def objective_text(measure: Measure | None, metric: Metric, *, decimals: int) -> str:
    """Return a value with its unit."""
    if measure is None or not math.isfinite(measure.value):
        return "—"
    return f"{measure.value * metric.scale:.{decimals}f} {metric.unit}".rstrip()


def sweep_headline(facts: SweepFacts) -> str:
    """Answer: which setting, by how much is it better, and can it be believed?"""
    ranked = facts.ranked
    if not ranked:
        return "No run of this sweep has a result."
    metric = objective_metric(facts)
    best = ranked[0]
    found = f"{facts.label} {objective_text(best.objective, metric, decimals=metric.decimals)}"
    if len(ranked) == 1:
        return f"Use {best.label}: {found}. It is the only run with a result."
    noise = [point for point in ranked if point.verdict == "within noise"]
    worse = [point for point in ranked if point.verdict == "worse"]
    if noise:
        names = _listed([point.label for point in noise])
        verb = "is" if len(noise) == 1 else "are"
        rest = "The others are clearly worse." if worse else "No run is clearly worse."
        nearest = f"{names} {verb} within noise of it"
        return f"Use {best.label}: {found}. But {nearest} ({_errors(noise)}). {rest}"
    if worse:
        gap = _gap(worse[0].difference, metric)
        return (
            f"Use {best.label}: {found}, which is {gap} better than {worse[0].label}, the next "
            f"({certainty(worse[0].difference)}). Every other run is clearly worse."
        )
    distance = abs(
        (ranked[1].objective or Measure(0.0)).value - (best.objective or Measure(0.0)).value
    )
    return (
        f"{best.label} has the best {facts.label}, {found.removeprefix(facts.label).strip()}, "
        f"{_shown(distance * metric.scale, metric)} from the next; this metric has no standard "
        "error, so it may be noise."
    )


def verdict_text(point: SweepPoint, metric: Metric) -> str:
    """Return the difference to the best run as one short line."""
    if point.difference is None:
        return ""
    sign = "+" if point.difference.value >= 0 else "\u2212"
    other = METRICS.get(point.difference.metric)
    # A difference in perplexity is one in cross-entropy, which has an error.
    shown = other if other is not None and other.key != metric.key else metric
    value, error = abs(point.difference.value) * shown.scale, point.difference.standard_error
    error = None if error is None else error * shown.scale
    places = max(difference_decimals(value, error, shown), shown.decimals)
    size = f"{sign}{value:.{places}f}"
    spread = "" if error is None else f" ± {error:.{places}f}"
    return f"{size}{spread} {shown.unit if shown is not metric else ''}".rstrip()


def _shown(value: float, metric: Metric) -> str:
    return f"{value:.{difference_decimals(value, None, metric)}f}"


def _gap(difference: Difference | None, metric: Metric) -> str:
    assert difference is not None
    shown = METRICS.get(difference.metric, metric)
    unit = "percentage points" if shown.percent else shown.unit
    if shown.key == "cross_entropy" and metric.key == "perplexity":
        unit += " of cross-entropy"
    value, error = abs(difference.value) * shown.scale, difference.standard_error
    error = None if error is None else error * shown.scale
    return f"{value:.{difference_decimals(value, error, shown)}f} {unit}".rstrip()


def _errors(points: list[SweepPoint]) -> str:
    distances = [
        point.difference.standard_errors or 0.0 for point in points if point.difference is not None
    ]
    low, high = (format_standard_errors(found(distances)) for found in (min, max))
    span = high if low == high else f"{low.removesuffix(' standard errors')} to {high}"
    return f"{span}, paired over the same tokens; {NOISE_LIMIT}"


def _listed(names: list[str]) -> str:
    if len(names) > 3:
        return f"{names[0]}, {names[1]} and {len(names) - 2} more"
    if len(names) == 1:
        return names[0]
    return " and ".join([", ".join(f"“{name}”" for name in names[:-1]), f"“{names[-1]}”"])
