"""From a sweep's runs to a report: ranked, each against the best over the same held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.cache.io.reader import Cache
from pipeline.evaluate.measures import HeldoutScores
from pipeline.models.tokenizer import tokenizer_from_files
from pipeline.observe.hardware import describe_environment
from pipeline.observe.metrics import METRICS_FILE, read_metrics
from pipeline.report.data.compose import models_to_hear
from pipeline.report.data.parts import (
    RunFolder,
    cache_facts,
    count_parameters,
    differences,
    generations,
    metrics_of,
    passages,
    run_curves,
    run_speed,
    setting_differences,
    settings_of,
    teacher_row,
)
from pipeline.report.data.records import (
    Command,
    Difference,
    Measure,
    Report,
    Row,
    SweepFacts,
    SweepPoint,
)
from pipeline.report.text.wording import METRICS

__all__ = ["SweptRun", "compose_sweep_report", "rank_points"]

_PAIRED = {
    "heldout/kl": "kl",
    "heldout/cross_entropy": "cross_entropy",
    # Monotone in the cross-entropy, whose differences have an error.
    "heldout/perplexity": "cross_entropy",
    "heldout/top1_agreement": "top1_agreement",
    "heldout/ece": "ece",
}
_LOGGED = {
    "train/loss": ("training loss", "nats"),
    "train/kd": ("training KL", "nats"),
    "train/ce": ("training cross-entropy", "nats"),
    "throughput/tokens_per_s": ("tokens per second", "tokens/s"),
    "data/wait_s": ("waiting for data", "s"),
    "memory/peak_gib": ("peak memory", "GiB"),
}
_MOST_CURVES = 24
"""Runs whose curves are sampled; more are a fog, and the page grows by 100 kB with each."""


@dataclass(frozen=True, slots=True)
class SweptRun:
    """One run of a sweep, as the sweep knows it."""

    label: str
    path: Path
    values: Mapping[str, Any]
    """The swept fields, by dotted name."""
    texts: Mapping[str, str]
    """The same as people read them."""
    state: Literal["finished", "pruned", "failed", "waiting", "running"]
    seconds: float | None = None
    error: str = ""


def compose_sweep_report(
    cache: Cache,
    runs: Sequence[SweptRun],
    *,
    name: str,
    objective: str,
    maximize: bool,
    fields: Sequence[str],
    teacher_folder: Path | None,
    commands: Sequence[Command],
    notes: Sequence[str],
) -> Report:
    """Read everything that the runs left; look at the best one, token by token.

    Args:
        cache: that all runs were trained from.
        runs: all of the sweep, at least one of them finished.
        name: of the sweep.
        objective: key of the metric that decides.
        maximize: whether larger is better.
        fields: the swept fields, dotted.
        teacher_folder: to let the teacher write beside the students; None leaves it out.
        commands: what to type to get each part again.
        notes: sentences under the table.
    """
    facts = rank_points(runs, name=name, objective=objective, maximize=maximize, fields=fields)
    by_label = {run.label: run for run in runs}
    folders = [
        RunFolder(
            point.label, "distilled", by_label[point.label].path, rank=point.rank,
            seconds=by_label[point.label].seconds,
        )
        for point in facts.points
        if point.rank
    ]  # fmt: skip
    best = folders[0]
    tokenizer = tokenizer_from_files(cache.tokenizer_files())
    sampled = folders[:_MOST_CURVES]
    speeds = [run_speed(folder) for folder in folders]
    commands = [
        *commands,
        *(
            Command(
                f"#{folder.rank} {folder.name}",
                f"python -m stages.train_student --config {folder.path / 'point.yaml'}",
            )
            for folder in folders
        ),
    ]
    hidden = len(folders) - len(sampled)
    more = [f"Curves are sampled for the best {len(sampled)} runs."] if hidden else []
    return Report(
        title=f"Sweep “{name}”: {len(runs)} students from one cache",
        rows=_rows(cache, folders, facts),
        differences=tuple(
            found for folder in folders[1:] for found in _all_differences(folder, best)
        ),
        curves=tuple(curve for folder in sampled for curve in run_curves(folder)),
        cache=cache_facts(cache),
        passages=passages(cache, best.path / "model", tokenizer),
        generations=generations(
            models_to_hear(teacher_folder, best, {f"best: {best.name}": best.path / "model"}),
            tokenizer,
        ),
        settings=settings_of(cache, [best]),
        environment=describe_environment(),
        commands=tuple(commands),
        notes=(*notes, *more),
        sweep=facts,
        speeds=tuple(speed for speed in speeds if speed is not None),
        setting_differences=setting_differences(folders),
    )


def rank_points(
    runs: Sequence[SweptRun],
    *,
    name: str,
    objective: str,
    maximize: bool,
    fields: Sequence[str],
) -> SweepFacts:
    """Order the runs by the objective and compare each with the best.

    Returns:
        The best first, then those without a result in the order given.
    """
    measured = {run.label: _objective(run, objective) for run in runs if run.state == "finished"}
    known = [run for run in runs if _is_number(measured.get(run.label))]
    sign = -1.0 if maximize else 1.0

    def value(run: SweptRun) -> float:
        found = measured[run.label]
        assert found is not None
        return found.value

    ranked = sorted(known, key=lambda run: sign * value(run))
    best = ranked[0] if ranked else None
    points = [
        _point(
            run,
            rank=rank,
            objective=measured[run.label],
            before=_objective(run, objective, "before"),
            difference=None if best is None or run is best else _to_best(
                run, best, objective, value(run) - value(best)
            ),
        )
        for rank, run in enumerate(ranked, start=1)
    ]  # fmt: skip
    points += [_point(run) for run in runs if run not in known]
    label, unit = _wording(objective)
    return SweepFacts(name, objective, label, unit, maximize, tuple(fields), tuple(points))


def _point(
    run: SweptRun,
    *,
    rank: int = 0,
    objective: Measure | None = None,
    before: Measure | None = None,
    difference: Difference | None = None,
) -> SweepPoint:
    numbers = {
        field: float(value)
        for field, value in run.values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    return SweepPoint(
        label=run.label,
        folder=str(run.path),
        state=run.state,
        values=dict(run.texts),
        numbers=numbers,
        rank=rank,
        objective=objective,
        before=before,
        difference=difference,
        error=run.error,
    )


def _objective(
    run: SweptRun, objective: str, when: Literal["before", "after"] = "after"
) -> Measure | None:
    """Return the objective with its error where the held-out scores give one."""
    file = run.path / f"heldout-{when}.json"
    metric = objective.removeprefix("heldout/")
    if objective.startswith("heldout/") and file.exists():
        found = metrics_of(HeldoutScores.read(str(file))).get(metric)
        if found is not None:
            return found
    metrics = run.path / METRICS_FILE
    if when == "before" or not metrics.exists():
        return None
    values = [r.values[objective] for r in read_metrics(metrics) if objective in r.values]
    return Measure(values[-1]) if values else None


def _to_best(run: SweptRun, best: SweptRun, objective: str, gap: float) -> Difference:
    files = [folder.path / "heldout-after.json" for folder in (run, best)]
    metric = _PAIRED.get(objective)
    if metric is not None and all(file.exists() for file in files):
        one, other = (HeldoutScores.read(str(file)) for file in files)
        # Another cache's rows cannot be paired; a sweep has one cache, but folders can be moved.
        if one.sample_ids == other.sample_ids:
            for found in differences(run.label, one, best.label, other):
                if found.metric == metric:  # scores of an older run may lack it
                    return found
    return Difference(run.label, best.label, objective, gap, None, paired=False)


def _rows(cache: Cache, folders: Sequence[RunFolder], facts: SweepFacts) -> tuple[Row, ...]:
    best = folders[0]
    values = {p.label: ", ".join(p.values[field] for field in facts.fields) for p in facts.points}
    rows = [
        Row(
            folder.name, folder.kind, metrics_of(folder.scores()),
            count_parameters(folder.path / "model"), values[folder.name], folder.rank,
        )
        for folder in folders
    ]  # fmt: skip
    before = best.scores_before()
    if before is not None:
        detail = f"as {best.name} began"
        rows.append(Row("student before", "before", metrics_of(before), None, detail))
    return (*rows, teacher_row(cache))


def _all_differences(folder: RunFolder, best: RunFolder) -> list[Difference]:
    one, other = folder.scores(), best.scores()
    if one.sample_ids != other.sample_ids:
        return []
    return differences(folder.name, one, best.name, other)


def _wording(objective: str) -> tuple[str, str]:
    metric = METRICS.get(objective.removeprefix("heldout/"))
    if objective.startswith("heldout/") and metric is not None:
        return f"held-out {metric.label if metric.key == 'kl' else metric.label.lower()}", (
            metric.unit
        )
    return _LOGGED.get(objective, (objective, ""))


def _is_number(found: Measure | None) -> bool:
    return found is not None and math.isfinite(found.value)
