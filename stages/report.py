"""The report of a finished `make distill`, of a sweep, or of one run: page, PNGs, JSON, table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Settings, option, parse_command
from pipeline.errors import ConfigError, DistillError, run_command
from pipeline.program import command_name

if TYPE_CHECKING:
    from pipeline.report import Report

__all__ = [
    "ReportRun",
    "main",
    "print_report",
    "write_run_report",
    "write_single_report",
    "write_sweep_report",
]

PROG = command_name("stages.report")
_ERRORS = "Standard errors are over held-out sequences; differences are paired by sequence."


class ReportRun(Settings):
    """Which run is reported."""

    run_dir: str = option(
        "runs/default", "folder of a finished `make distill`, of a sweep, or of one student"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report again from what the runs left."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    run = parse_command(ReportRun, arguments, prog=PROG, description=__doc__ or "").settings
    root = Path(run.run_dir)
    if (root / "sweep.json").exists():
        page = write_sweep_report(root)
    elif (root / "student").exists():
        page = write_run_report(
            root, command=f"{command_name('stages.distill')} --run_dir {run.run_dir}"
        )
    elif (root / "finished.json").exists():
        page = write_single_report(root)
    else:
        raise ConfigError(
            f"{root}: holds no finished run",
            expected="the folder of `make distill` (cache and student in it), of a sweep "
            "(sweep.json) or of one finished student (finished.json)",
            do="give another RUN=, or run the same command again until it is finished",
        )
    print(f"\nreport    {page}")
    return 0


def write_run_report(root: Path, *, command: str) -> Path:
    """Compose and write the report of `root`, print its table, return the page's path.

    Args:
        root: holds `cache`, `student` and, where they were trained, `control` and `dense`.
        command: that gives all of it.

    Raises:
        CacheError: no complete cache.
        ResumeError: a run is not finished.
    """
    from pipeline.cache.io.reader import open_cache
    from pipeline.observe.logs import configure_logging
    from pipeline.report import Command
    from pipeline.report.compose.run_report import compose_report
    from pipeline.report.compose.runs import RunFolder

    configure_logging("warning")
    cache = open_cache(str(root / "cache"))
    runs = [
        RunFolder(
            "distilled student", "distilled", root / "student", "learned from the teacher as well"
        )
    ]
    if (root / "control").exists():
        runs.append(
            RunFolder(
                "cross-entropy control",
                "control",
                root / "control",
                "same start, data and steps; learned from the text alone",
            )
        )
    if (root / "dense").exists():
        entries = cache.manifest.identity["scheme"].get("top_k")
        all_of_them = f"all {entries:,} cached entries" if entries else "all cached entries"
        runs.append(
            RunFolder(
                "dense student",
                "dense",
                root / "dense",
                f"same start, data and steps; learned from {all_of_them} of a target",
            )
        )
    configs = [("the cache", "cache_teacher", root / "cache" / "_meta" / "config.yaml")]
    configs += [(run.name, "train_student", run.path / "config.yaml") for run in runs]
    teacher, missing = _teacher_folder(cache)
    report = compose_report(
        cache,
        runs,
        teacher_folder=teacher,
        commands=[
            Command("everything on this page", command),
            *(
                Command(what, f"{command_name(f'stages.{stage}')} --config {config}")
                for what, stage, config in configs
            ),
        ],
        notes=[_ERRORS, *missing],
        title="Distillation report",
    )
    return _write(report, root)


def write_single_report(root: Path) -> Path:
    """Compose and write the report of one finished student beside it.

    Args:
        root: an output folder of stage two.

    Raises:
        ConfigError: the folder holds no configuration.
        CacheError: its cache is not there any more.
    """
    from pipeline.config.files import read_config_file
    from pipeline.data.mixture.caches import open_caches
    from pipeline.data.mixture.settings import read_cache_dir
    from pipeline.observe.logs import configure_logging
    from pipeline.report import Command
    from pipeline.report.compose.run_report import compose_report
    from pipeline.report.compose.runs import RunFolder

    configure_logging("warning")
    settings = read_config_file(str(root / "config.yaml"))
    cache = open_caches(
        read_cache_dir(settings.get("cache_dir")),
        teachers=settings.get("data", {}).get("teachers", "each"),
    )
    teacher, missing = _teacher_folder(cache)
    report = compose_report(
        cache,
        [RunFolder(root.name, "distilled", root)],
        teacher_folder=teacher,
        commands=[
            Command(
                "the student",
                f"{command_name('stages.train_student')} --config {root / 'config.yaml'}",
            ),
            Command("this page", f"{PROG} --run_dir {root}"),
        ],
        notes=[_ERRORS, *missing],
        title=f"Student {root.name}",
    )
    return _write(report, root)


def write_sweep_report(root: Path) -> Path:
    """Compose and write the report of a sweep.

    Args:
        root: the sweep's folder.

    Raises:
        ConfigError: no sweep there, or no run of it is finished.
        CacheError: its cache is not there any more.
    """
    from pipeline.data.mixture.caches import open_caches
    from pipeline.data.mixture.settings import read_cache_dir
    from pipeline.observe.logs import configure_logging
    from pipeline.report import Command
    from pipeline.report.compose.ranking import SweptRun
    from pipeline.report.compose.sweep_report import compose_sweep_report
    from pipeline.sweeps.ledger import read_inventory
    from pipeline.sweeps.space import value_text

    configure_logging("warning")
    ledger = read_inventory(root)
    if not ledger.ranked():
        raise ConfigError(
            f"{root}: no run of this sweep is finished",
            expected="at least one",
            do=f"run it first: {ledger.command}",
        )
    cache = open_caches(read_cache_dir(ledger.cache_dir), teachers=ledger.teachers)
    teacher, missing = _teacher_folder(cache)
    report = compose_sweep_report(
        cache,
        [
            SweptRun(
                label=entry.label,
                path=root / "runs" / entry.name,
                values=entry.values,
                texts={name: value_text(value) for name, value in entry.values.items()},
                state=entry.state,
                seconds=entry.seconds,
                error=entry.error,
            )
            for entry in ledger.entries
        ],
        name=ledger.name,
        objective=ledger.objective,
        maximize=ledger.maximize,
        fields=ledger.fields,
        teacher_folder=teacher,
        commands=[
            Command("every run and this page", ledger.command),
            Command("this page alone", f"{PROG} --run_dir {root}"),
        ],
        notes=[
            _ERRORS,
            "The errors are those of the held-out text. Another seed moves every run as well; a "
            "sweep over `seed` with the rest fixed shows by how much.",
            *missing,
        ],
    )
    return _write(report, root)


def print_report(root: Path) -> Path:
    """Print the table of a report that is there; return the page's path."""
    from pipeline.report import read_report, terminal_table

    print("\n" + terminal_table(read_report(root / "report" / "report.json")))
    return root / "report" / "report.html"


def _write(report: Report, root: Path) -> Path:
    from pipeline.report import terminal_table, write_report

    page = write_report(report, root / "report")
    print("\n" + terminal_table(report))
    return page


def _teacher_folder(cache: Any) -> tuple[Path | None, list[str]]:
    """Return the teacher's weights, or a note that says why its texts are missing."""
    from pipeline.data.mixture.caches import caches_of
    from pipeline.models.resolve import resolve_model

    if len({str(part.manifest.identity["teacher"]["model"]) for part in caches_of(cache)}) > 1:
        return None, ["The teachers' generations are left out: there are several teachers."]
    teacher = caches_of(cache)[0].manifest.identity["teacher"]
    # Folders and the embedded teacher have digests instead of a commit.
    revision = None if ":" in teacher["revision"] else teacher["revision"]
    try:
        folder = resolve_model(teacher["model"], revision=revision, role="teacher").path
    except DistillError as error:
        return None, [f"The teacher's generations are left out: {str(error).rstrip('.')}."]
    return folder, []


if __name__ == "__main__":
    sys.exit(run_command(main))
