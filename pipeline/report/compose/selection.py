"""What a run learned from: the caches of its mixture, the rows it kept, the tokens that counted."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pipeline.data.filter import FILTER_FILE, FilterCounts
from pipeline.report.compose.measures import measure_of
from pipeline.report.compose.runs import Run
from pipeline.report.text.metrics import METRICS, lower_first
from pipeline.report.text.numbers import format_measure

__all__ = ["selection_notes"]


def selection_notes(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return a sentence for whatever of these a run has."""
    notes = [note for run in runs for note in (_mixture(run), _filter(run), _weights(run))]
    return tuple(note for note in notes if note)


def _mixture(run: Run) -> str:
    """How near the student came to the teacher of each cache."""
    parts = {} if run.after is None else run.after.by_tag()
    before = {} if run.before is None else run.before.by_tag()
    if not parts:
        return ""
    first = next(iter(parts.values()))
    metric = METRICS[next(name for name in first.sums if name in METRICS)]
    told = []
    for tag, scores in parts.items():
        text = " ".join(format_measure(measure_of(scores.mean(metric.key)), metric)).strip()
        if tag in before:
            then = measure_of(before[tag].mean(metric.key))
            text += f" (before {format_measure(then, metric)[0]})"
        told.append(f"{tag} {text}")
    return (
        f"{run.folder.name}: {lower_first(metric.label)} on the held-out rows of each cache, in "
        f"{metric.unit}: {'; '.join(told)}."
    )


def _filter(run: Run) -> str:
    """How many rows data.filter kept."""
    file = run.folder.path / FILTER_FILE
    if not file.exists():
        return ""
    counts = json.loads(file.read_bytes())
    told = [
        f"{f'of {tag} ' if tag else ''}{FilterCounts(**kept).text()}"
        for tag, kept in counts.items()
    ]
    condition = run.config.get("data", {}).get("filter")
    return f"{run.folder.name}: data.filter `{condition}` kept {'; '.join(told)}."


def _weights(run: Run) -> str:
    """How many tokens of a step counted, on average over the logged steps."""
    keys = ("train/weighted_tokens", "train/effective_tokens")
    logged = [r.values for r in run.metrics if all(key in r.values for key in keys)]
    if not logged:
        return ""
    share, effective = (sum(v[key] for v in logged) / len(logged) for key in keys)
    weight = run.config.get("loss", {}).get("weight")
    return (
        f"{run.folder.name}: loss.weight {weight}: {100 * share:.1f} % of a step's supervised "
        f"tokens counted, as many as {100 * effective:.1f} % of equal weight (their effective "
        "number); the held-out measures are of all tokens."
    )
