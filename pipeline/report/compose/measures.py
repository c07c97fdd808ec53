"""Held-out scores to the report's rows and differences, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.cache.io.reader import Cache
from pipeline.evaluate.measures import HeldoutScores, MeanError, paired_difference, ratio_mean
from pipeline.report.compose.runs import Run
from pipeline.report.data.measures import Difference, Measure, Row
from pipeline.report.text.metrics import kl_note

__all__ = [
    "before_rows",
    "comparable",
    "measure_of",
    "measured_notes",
    "metrics_of",
    "paired_differences",
    "row_of",
    "teacher_row",
]


def row_of(run: Run, *, detail: str | None = None) -> Row:
    """Return a trained student's row; `detail` in place of the folder's own."""
    folder = run.folder
    said = folder.detail if detail is None else detail
    if run.after is None:
        said = ", ".join(part for part in (said, "not measured") if part)
    metrics = {} if run.after is None else metrics_of(run.after)
    return Row(folder.name, folder.kind, metrics, run.num_parameters, said, folder.rank)


def before_rows(run: Run, name: str, detail: str, num_parameters: int | None) -> tuple[Row, ...]:
    """Return the row of the student before training; none where it was not measured."""
    if run.before is None:
        return ()
    return (Row(name, "before", metrics_of(run.before), num_parameters, detail),)


def teacher_row(cache: Cache, *, bucketed: bool) -> Row:
    """The teacher's own cross-entropy is in the cache; it agrees with itself by definition.

    A cache without held-out rows gives a row without measures.
    """
    sums, counts = [], []
    source = cache.source("heldout")
    for shard, rows in enumerate(source.shard_rows()):
        for row in source.read_rows(shard, range(rows)):
            sums.append(-float(row.targets.label_logprob_N.sum(dtype=np.float64)))
            counts.append(row.targets.num_positions)
    model = str(cache.manifest.identity["teacher"]["model"])
    if not sums:
        return Row("teacher", "teacher", {}, None, f"{model}, not measured")
    entropy = measure_of(ratio_mean(sums, counts))
    perplexity = float(np.exp(entropy.value))
    error = entropy.standard_error
    return Row(
        "teacher",
        "teacher",
        {
            "kl_bucketed" if bucketed else "kl": Measure(0.0),
            "cross_entropy": entropy,
            "perplexity": Measure(perplexity, None if error is None else perplexity * error),
            "top1_agreement": Measure(1.0),
            "acceptance_bound" if bucketed else "acceptance": Measure(1.0),
        },
        None,
        model,
    )


def metrics_of(scores: HeldoutScores) -> dict[str, Measure]:
    """Return every measure of a row."""
    metrics = {name: measure_of(scores.mean(name)) for name in scores.sums}
    metrics["perplexity"] = measure_of(scores.perplexity())
    ece = scores.calibration_error()
    if ece is not None:
        metrics["ece"] = measure_of(ece)
    return metrics


def paired_differences(
    a: str, scores_a: HeldoutScores | None, b: str, scores_b: HeldoutScores | None
) -> tuple[Difference, ...]:
    """Return every metric of a minus that of b, subtracted sequence by sequence.

    None where one of the two was not measured.
    """
    if scores_a is None or scores_b is None:
        return ()
    found = []
    for metric in scores_a.metrics:
        if metric in scores_b.metrics:
            mean = measure_of(paired_difference(scores_a, scores_b, metric))
            found.append(Difference(a, b, metric, mean.value, mean.standard_error, paired=True))
    return tuple(found)


def comparable(a: HeldoutScores | None, b: HeldoutScores | None) -> bool:
    """Whether both were measured, and on the same sequences."""
    return a is not None and b is not None and a.sample_ids == b.sample_ids


def measured_notes(runs: Sequence[Run], *, bucketed: bool) -> tuple[str, ...]:
    """Return what the held-out KL is over, and which runs have none."""
    missing = [run.folder.name for run in runs if run.after is None]
    notes = () if len(missing) == len(runs) else (kl_note(bucketed=bucketed),)
    if not missing:
        return notes
    return (*notes, f"Not measured on held-out text (train.evaluate never): {', '.join(missing)}.")


def measure_of(mean: MeanError) -> Measure:
    """Return a mean with its standard error, none where that is not a number."""
    error = mean.standard_error
    return Measure(mean.value, error if math.isfinite(error) else None)
