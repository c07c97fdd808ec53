"""A sweep's runs in order of the objective, each against the best over the same held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.evaluate.measures import HeldoutScores
from pipeline.report.compose.measures import comparable, metrics_of, paired_differences
from pipeline.report.compose.runs import Run
from pipeline.report.data.measures import Difference, Measure
from pipeline.report.data.sweep import RunState, SweepFacts, SweepPoint
from pipeline.report.text.metrics import objective_words

__all__ = ["SweptRun", "rank_points"]

_HELDOUT = "heldout/"


@dataclass(frozen=True, slots=True)
class SweptRun:
    """One run of a sweep, as the sweep knows it."""

    label: str
    path: Path
    values: Mapping[str, Any]
    """The swept fields, by dotted name."""
    texts: Mapping[str, str]
    """The same as people read them."""
    state: RunState
    seconds: float | None = None
    error: str = ""


def rank_points(
    swept: Sequence[SweptRun],
    runs: Mapping[str, Run],
    *,
    name: str,
    objective: str,
    maximize: bool,
    fields: Sequence[str],
) -> SweepFacts:
    """Order the runs by the objective and compare each with the best.

    Args:
        swept: all runs of the sweep.
        runs: what the finished ones left, by label.
        name: of the sweep.
        objective: key of the metric that decides.
        maximize: whether larger is better.
        fields: the swept fields, dotted.

    Returns:
        The best first, then those without a result in the order given.
    """
    measured = {
        label: found
        for label, run in runs.items()
        if (found := _objective(run, objective)) is not None and math.isfinite(found.value)
    }
    sign = -1.0 if maximize else 1.0
    order = sorted(
        (entry for entry in swept if entry.label in measured),
        key=lambda entry: sign * measured[entry.label].value,
    )
    points = []
    for rank, entry in enumerate(order, start=1):
        run, best = runs[entry.label], runs[order[0].label]
        gap = measured[entry.label].value - measured[order[0].label].value
        points.append(
            _point(
                entry,
                rank=rank,
                objective=measured[entry.label],
                before=_heldout(run.before, objective),
                difference=None if rank == 1 else _to_best(run, best, objective, gap),
            )
        )
    points += [_point(entry) for entry in swept if entry.label not in measured]
    label, unit = objective_words(objective)
    return SweepFacts(name, objective, label, unit, maximize, tuple(fields), tuple(points))


def _point(
    entry: SweptRun,
    *,
    rank: int = 0,
    objective: Measure | None = None,
    before: Measure | None = None,
    difference: Difference | None = None,
) -> SweepPoint:
    return SweepPoint(
        label=entry.label,
        folder=str(entry.path),
        state=entry.state,
        values=dict(entry.texts),
        numbers={
            field: float(value)
            for field, value in entry.values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        },
        rank=rank,
        objective=objective,
        before=before,
        difference=difference,
        error=entry.error,
    )


def _objective(run: Run, objective: str) -> Measure | None:
    """Return the objective with its error where the held-out scores give one."""
    found = _heldout(run.after, objective)
    if found is not None:
        return found
    values = [r.values[objective] for r in run.metrics if objective in r.values]
    return Measure(values[-1]) if values else None


def _heldout(scores: HeldoutScores | None, objective: str) -> Measure | None:
    if scores is None or not objective.startswith(_HELDOUT):
        return None
    return metrics_of(scores).get(objective.removeprefix(_HELDOUT))


def _to_best(run: Run, best: Run, objective: str, gap: float) -> Difference:
    metric = objective.removeprefix(_HELDOUT)
    # Monotone in the cross-entropy, whose differences have an error.
    metric = "cross_entropy" if metric == "perplexity" else metric
    # Another cache's rows cannot be paired; a sweep has one cache, but folders can be moved.
    if objective.startswith(_HELDOUT) and comparable(run.after, best.after):
        names = run.folder.name, best.folder.name
        for found in paired_differences(names[0], run.after, names[1], best.after):
            if found.metric == metric:  # scores of an older run may lack it
                return found
    return Difference(run.folder.name, best.folder.name, objective, gap, None, paired=False)
