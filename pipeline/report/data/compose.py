"""From run folders and a cache to a report: scores, differences, curves, texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.cache.io.reader import Cache
from pipeline.evaluate.measures import HeldoutScores
from pipeline.models.tokenizer import tokenizer_from_files
from pipeline.observe.hardware import describe_environment
from pipeline.report.data.parts import (
    RunFolder,
    cache_facts,
    count_parameters,
    differences,
    generations,
    initial_folder,
    metrics_of,
    passages,
    run_curves,
    run_speed,
    setting_differences,
    settings_of,
    teacher_row,
)
from pipeline.report.data.records import Command, Kind, Report, Row

__all__ = ["RunFolder", "compose_report", "models_to_hear"]


def compose_report(
    cache: Cache,
    runs: Sequence[RunFolder],
    *,
    teacher_folder: Path | None,
    commands: Sequence[Command],
    notes: Sequence[str],
    title: str,
) -> Report:
    """Read everything that the runs left and look at the models themselves.

    Args:
        cache: that all runs were trained from.
        runs: finished runs; the first is the distilled one, whose start is the "before".
        teacher_folder: to let the teacher write beside the students; None leaves it out.
        commands: what to type to get each part again.
        notes: sentences under the table.
        title: heading of the page.
    """
    first = runs[0]
    before = first.scores_before()
    scored: list[tuple[str, Kind, str, HeldoutScores]] = []
    if before is not None:
        scored.append(("student before", "before", "the student before training", before))
    scored += [(run.name, run.kind, run.detail, run.scores()) for run in runs]
    tokenizer = tokenizer_from_files(cache.tokenizer_files())
    parameters = count_parameters(first.path / "model")
    rows = [
        Row(name, kind, metrics_of(scores), parameters, detail)
        for name, kind, detail, scores in scored
    ]
    rows.append(teacher_row(cache))
    after = first.scores()
    compared = [
        found
        for name, _, _, scores in scored
        if name != first.name
        for found in differences(first.name, after, name, scores)
    ]
    models = {run.name: run.path / "model" for run in runs}
    speeds = [run_speed(run) for run in runs]
    return Report(
        title=title,
        rows=tuple(rows),
        differences=tuple(compared),
        curves=tuple(curve for run in runs for curve in run_curves(run)),
        cache=cache_facts(cache),
        passages=passages(cache, first.path / "model", tokenizer),
        generations=generations(models_to_hear(teacher_folder, first, models), tokenizer),
        settings=settings_of(cache, runs),
        environment=describe_environment(),
        commands=tuple(commands),
        notes=tuple(notes),
        speeds=tuple(speed for speed in speeds if speed is not None),
        setting_differences=setting_differences(runs) if len(runs) > 1 else (),
    )


def models_to_hear(
    teacher_folder: Path | None, first: RunFolder, trained: dict[str, Path]
) -> dict[str, Path]:
    """Return the folders of the models that write for the prompts, by name, teacher first."""
    before = initial_folder(first)
    return {
        **({"teacher": teacher_folder} if teacher_folder else {}),
        **({"student before": before} if before else {}),
        **trained,
    }
