"""From a sweep's runs to a report: ranked, the best looked at token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.cache.io.reader import Cache
from pipeline.models.tokenizer import tokenizer_from_files
from pipeline.observe.hardware import describe_environment
from pipeline.program import command_name
from pipeline.report.compose.cache import cache_facts, kl_is_bucketed
from pipeline.report.compose.curves import curves_of, shared_axis, speeds_of
from pipeline.report.compose.measures import (
    before_rows,
    comparable,
    measured_notes,
    paired_differences,
    row_of,
    teacher_row,
)
from pipeline.report.compose.ranking import SweptRun, rank_points
from pipeline.report.compose.runs import Run, RunFolder, has_ended, logged_key, read_run
from pipeline.report.compose.settings import setting_differences, settings_of
from pipeline.report.compose.texts import generations, passages, writers
from pipeline.report.data.report import Report
from pipeline.report.data.runs import Command

__all__ = ["compose_sweep_report", "finished_runs"]

_MOST_CURVES = 24
"""Runs whose curves are shown; more are a fog, and the page grows by 100 kB with each."""


def compose_sweep_report(
    cache: Cache,
    swept: Sequence[SweptRun],
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
        swept: all runs of the sweep, at least one of them finished.
        name: of the sweep.
        objective: key of the metric that decides.
        maximize: whether larger is better.
        fields: the swept fields, dotted.
        teacher_folder: to let the teacher write beside the students; None leaves it out.
        commands: what to type to get each part again.
        notes: sentences under the table, after the one on the KL.
    """
    bucketed = kl_is_bucketed(cache)
    by_label = finished_runs(swept, bucketed=bucketed)
    facts = rank_points(
        swept,
        by_label,
        name=name,
        objective=logged_key(objective, bucketed=bucketed),
        maximize=maximize,
        fields=fields,
    )
    runs = [_placed(by_label[point.label], point.rank) for point in facts.ranked]
    best, shown = runs[0], runs[:_MOST_CURVES]
    details = {p.label: ", ".join(p.values[field] for field in fields) for p in facts.ranked}
    more = [f"Curves are shown for the best {len(shown)} runs."] if len(shown) < len(runs) else []
    tokenizer = tokenizer_from_files(cache.tokenizer_files())
    over = shared_axis(shown)
    models = writers(teacher_folder, best, {f"best: {best.folder.name}": best.model})
    return Report(
        title=f"Sweep “{name}”: {len(swept)} students from one cache",
        rows=(
            *(row_of(run, detail=details[run.folder.name]) for run in runs),
            *before_rows(best, "student before", f"as {best.folder.name} began", None),
            teacher_row(cache, bucketed=bucketed),
        ),
        differences=tuple(
            difference
            for run in runs[1:]
            if comparable(run.after, best.after)
            for difference in paired_differences(
                run.folder.name, run.after, best.folder.name, best.after
            )
        ),
        curves=tuple(
            curve for run in shown for curve in curves_of(run.metrics, run.folder, over=over)
        ),
        cache=cache_facts(cache),
        passages=passages(cache, best.model, tokenizer),
        generations=generations(models, tokenizer),
        settings=settings_of(cache, [best]),
        environment=describe_environment(),
        commands=(*commands, *(_command(run.folder) for run in runs)),
        notes=(*measured_notes(runs, bucketed=bucketed), *notes, *more),
        sweep=facts,
        speeds=speeds_of(runs),
        setting_differences=setting_differences(runs),
    )


def finished_runs(swept: Sequence[SweptRun], *, bucketed: bool) -> dict[str, Run]:
    """Read what the finished runs left, by label; one that lost what it left has no result."""
    return {
        entry.label: read_run(
            RunFolder(entry.label, "distilled", entry.path, seconds=entry.seconds),
            bucketed=bucketed,
        )
        for entry in swept
        if entry.state == "finished" and has_ended(entry.path)
    }


def _placed(run: Run, rank: int) -> Run:
    return replace(run, folder=replace(run.folder, rank=rank))


def _command(folder: RunFolder) -> Command:
    return Command(
        f"#{folder.rank} {folder.name}",
        f"{command_name('stages.train_student')} --config {folder.path / 'point.yaml'}",
    )
