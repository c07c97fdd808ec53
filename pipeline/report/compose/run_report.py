"""From run folders and a cache to a report: what each run left, then the records of the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.cache.io.reader import Cache
from pipeline.models.tokenizer import tokenizer_from_files
from pipeline.observe.hardware import describe_environment
from pipeline.report.compose.cache import cache_facts, kl_is_bucketed
from pipeline.report.compose.curves import (
    curves_of,
    shared_axis,
    speeds_of,
    started_alike,
)
from pipeline.report.compose.measures import (
    before_rows,
    measured_notes,
    paired_differences,
    row_of,
    teacher_row,
)
from pipeline.report.compose.runs import RunFolder, read_run
from pipeline.report.compose.selection import selection_notes
from pipeline.report.compose.settings import setting_differences, settings_of
from pipeline.report.compose.texts import generations, passages, writers
from pipeline.report.data.report import Report
from pipeline.report.data.runs import Command

__all__ = ["compose_report"]

_BEFORE = "student before"


def compose_report(
    cache: Cache,
    folders: Sequence[RunFolder],
    *,
    teacher_folder: Path | None,
    commands: Sequence[Command],
    notes: Sequence[str],
    title: str,
) -> Report:
    """Read everything that the runs left and look at the models themselves.

    Args:
        cache: that all runs were trained from.
        folders: finished runs; the first is the distilled one, whose start is the "before".
        teacher_folder: to let the teacher write beside the students; None leaves it out.
        commands: what to type to get each part again.
        notes: sentences under the table, after the one on the KL.
        title: heading of the page.

    Raises:
        ResumeError: a run is not finished.
    """
    bucketed = kl_is_bucketed(cache)
    runs = [read_run(folder, bucketed=bucketed) for folder in folders]
    first = runs[0]
    scores = {_BEFORE: first.before, **{run.folder.name: run.after for run in runs[1:]}}
    tokenizer = tokenizer_from_files(cache.tokenizer_files())
    over = shared_axis(runs)
    models = writers(teacher_folder, first, {run.folder.name: run.model for run in runs})
    return Report(
        title=title,
        rows=(
            *before_rows(first, _BEFORE, "the student before training", first.num_parameters),
            *(row_of(run) for run in runs),
            teacher_row(cache, bucketed=bucketed),
        ),
        differences=tuple(
            difference
            for name, other in scores.items()
            for difference in paired_differences(first.folder.name, first.after, name, other)
        ),
        curves=tuple(
            curve
            for run in runs
            for curve in curves_of(started_alike(first, run), run.folder, over=over)
        ),
        cache=cache_facts(cache),
        passages=passages(cache, first.model, tokenizer),
        generations=generations(models, tokenizer),
        settings=settings_of(cache, runs),
        environment=describe_environment(),
        commands=tuple(commands),
        notes=(*measured_notes(runs, bucketed=bucketed), *selection_notes(runs), *notes),
        speeds=speeds_of(runs),
        setting_differences=setting_differences(runs) if len(runs) > 1 else (),
    )
