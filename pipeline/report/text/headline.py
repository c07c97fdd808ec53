"""The one-sentence answer of a report."""

from __future__ import annotations

import math

from pipeline.report.data.measures import Difference, Row
from pipeline.report.data.report import Report
from pipeline.report.text.metrics import distance_of
from pipeline.report.text.sentences import difference_sentence
from pipeline.report.text.sweep_text import sweep_headline

__all__ = ["headline"]


def headline(report: Report) -> str:
    """Return the one-sentence answer: the report's own, or the one its numbers give."""
    if report.summary:
        return report.summary
    if report.sweep is not None:
        return sweep_headline(report.sweep)
    difference = _main_difference(report)
    if difference is None:
        return "This report compares no two models."
    return difference_sentence(difference, report.rows)


def _main_difference(report: Report) -> Difference | None:
    """Return distilled against control in KL, then against the student before, measured first."""
    distilled = next((row for row in report.rows if row.kind == "distilled"), None)
    metric = distance_of(distilled)
    if distilled is None or metric is None:
        return None
    kinds = {row.name: row.kind for row in report.rows}
    for other in ("control", "before"):
        for difference in report.differences:
            pair = (difference.a, kinds.get(difference.b))
            if difference.metric == metric.key and pair == (distilled.name, other):
                return difference
        rival = next((row for row in report.rows if row.kind == other), None)
        if rival is not None and metric.key in rival.metrics:
            return _unpaired(distilled, rival, metric.key)
    return None


def _unpaired(a: Row, b: Row, key: str) -> Difference:
    first, second = a.metrics[key], b.metrics[key]
    error = None
    if first.standard_error is not None and second.standard_error is not None:
        error = math.hypot(first.standard_error, second.standard_error)
    return Difference(a.name, b.name, key, first.value - second.value, error, paired=False)
