"""The report of a finished `make distill`: page, PNGs, report.json and the table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Settings, option, parse_command
from pipeline.errors import run_command

__all__ = ["ReportRun", "main", "write_run_report"]

PROG = "python -m stages.report"


class ReportRun(Settings):
    """Which run is reported."""

    run_dir: str = option("runs/default", "folder of a finished `make distill`")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report anew from what the runs left."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    run = parse_command(ReportRun, arguments, prog=PROG, description=__doc__ or "").settings
    page = write_run_report(Path(run.run_dir), command=f"make distill RUN={run.run_dir}")
    print(f"\nreport    {page}")
    return 0


def write_run_report(root: Path, *, command: str) -> Path:
    """Compose and write the report of `root`, print its table, return the page's path.

    Args:
        root: holds `cache`, `student` and, where one was trained, `control`.
        command: what made all of it.

    Raises:
        CacheError: no complete cache.
        ResumeError: a run is not finished.
    """
    from pipeline.cache.reader import open_cache
    from pipeline.models.resolve import resolve_model
    from pipeline.observe.logs import configure_logging
    from pipeline.report import Command, terminal_table, write_report
    from pipeline.report.compose import RunFolder, compose_report

    configure_logging("warning")
    cache = open_cache(str(root / "cache"))
    teacher = cache.manifest.identity["teacher"]
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
    configs = [("the cache", "cache_teacher", root / "cache" / "_meta" / "config.yaml")]
    configs += [(run.name, "train_student", run.path / "config.yaml") for run in runs]
    report = compose_report(
        cache,
        runs,
        teacher_folder=resolve_model(
            teacher["model"], revision=_hub_revision(teacher), role="teacher"
        ).path,
        commands=[
            Command("everything on this page", command),
            *(
                Command(what, f"python -m stages.{stage} --config {config}")
                for what, stage, config in configs
            ),
        ],
        notes=[
            "KL is that of the cached entries with all other tokens as one outcome: a lower bound "
            "of the full KL.",
            "Standard errors are over held-out sequences; differences are paired by sequence.",
        ],
        title="Distillation report",
    )
    page = write_report(report, root / "report")
    print("\n" + terminal_table(report))
    return page


def _hub_revision(teacher: dict[str, str]) -> str | None:
    """Return the commit of a hub model; folders and the embedded teacher have digests instead."""
    return None if ":" in teacher["revision"] else teacher["revision"]


if __name__ == "__main__":
    sys.exit(run_command(main))
