"""Download what a run names (models, data set), so that the stages run offline."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.config import Settings, option, parse_command
from pipeline.errors import ConfigError, run_command
from pipeline.program import command_name

__all__ = ["PrefetchRun", "main"]

PROG = command_name("stages.prefetch")


class PrefetchRun(Settings):
    """Which configurations name the models and the data set."""

    teacher_config: str | None = option(None, "configuration of stage one: teacher and data set")
    student_config: str | None = option(None, "configuration of stage two: the student")


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch what is missing; what is there already costs a look at the hub."""
    from pipeline.api.settings import StudentRun, TeacherRun

    run = parse_command(
        PrefetchRun,
        list(sys.argv[1:] if argv is None else argv),
        prog=PROG,
        description=__doc__ or "",
        examples=[
            f"{PROG} --teacher_config stages/configs/recipes/arcee-spark/teacher.yaml "
            "--student_config stages/configs/recipes/arcee-spark/student.yaml"
        ],
    ).settings
    if run.teacher_config is None and run.student_config is None:
        raise ConfigError(
            "no configuration is named", expected="--teacher_config, --student_config, or both"
        )
    # Both files are read before anything is downloaded.
    teacher = student = None
    if run.teacher_config is not None:
        teacher = parse_command(
            TeacherRun, ["--config", run.teacher_config], prog=PROG, description=""
        ).settings
    if run.student_config is not None:
        student = parse_command(
            StudentRun, ["--config", run.student_config], prog=PROG, description=""
        ).settings
    from pipeline.corpus.sources.registry import open_source
    from pipeline.models.resolve import resolve_model

    if teacher is not None:
        model = resolve_model(
            teacher.teacher.model, revision=teacher.teacher.revision, role="teacher"
        )
        print(f"teacher  {model.name} ({model.revision}) {model.path}", flush=True)
        source = open_source(teacher.corpus)
        rows = "rows not counted" if source.total is None else f"{source.total} rows"
        print(f"data set {source.name}, {rows}", flush=True)
    if student is not None:
        model = resolve_model(
            student.student.model, revision=student.student.revision, role="student"
        )
        print(f"student  {model.name} ({model.revision}) {model.path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
