"""Stage two: train a student from a cache; the teacher is never needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from pipeline.config import Settings, dump_yaml, option, parse_command
from pipeline.config.command import command_line
from pipeline.data.settings import DataSettings
from pipeline.errors import run_command
from pipeline.loss.settings import LossSettings
from pipeline.observe.settings import ObserveSettings
from pipeline.student.settings import OutputSettings, StudentSettings, TrainSettings

__all__ = ["StudentRun", "main"]

PROG = "python -m stages.train_student"


class StudentRun(Settings):
    """Everything stage two can be told."""

    cache_dir: str = option(
        "runs/default/cache", "the cache: a folder, or any address fsspec opens (s3://bucket/cache)"
    )
    seed: int = option(42, "of the order of the samples", ge=0)
    student: StudentSettings = StudentSettings()
    loss: LossSettings = LossSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    output: OutputSettings = OutputSettings()
    observe: ObserveSettings = ObserveSettings()

    @model_validator(mode="after")
    def _one_batch_size(self) -> Self:
        if self.data.batch_tokens is not None and self.train.per_device_train_batch_size != 1:
            raise ValueError(
                f"train.per_device_train_batch_size: found "
                f"{self.train.per_device_train_batch_size} with data.batch_tokens, which counts "
                "tokens instead; expected 1"
            )
        return self


def main(argv: Sequence[str] | None = None) -> int:
    """Run stage two; the same command again goes on where it stopped."""
    from stages.cache_teacher import TeacherRun

    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parse_command(
        StudentRun,
        arguments,
        prog=PROG,
        description=__doc__ or "",
        switches={
            "dry_run": "print the plan (samples, tokens, steps, memory, time from a short "
            "calibration) and exit",
            "check": "refuse what can be refused before training, and exit (a launcher of several "
            "processes would print each message once a process)",
        },
        examples=[
            f"{PROG} --config stages/configs/student.yaml",
            "torchrun --standalone --nproc-per-node 2 -m stages.train_student "
            "--config stages/configs/student.yaml",
            f"{PROG} --cache_dir s3://bucket/cache --student_model Qwen/Qwen2-1.5B "
            "--output_dir /fsx/student --temperature 2 --alpha 0.5",
        ],
        elsewhere={"stage one, cache-teacher": TeacherRun},
    )
    run = command.settings
    from pipeline.observe.logs import configure_logging

    configure_logging(run.observe.log_level)
    from pipeline.student.estimate import check_resources, forecast, print_forecast
    from pipeline.student.run import open_inputs, train_student
    from pipeline.student.training.distributed import read_world

    inputs = open_inputs(
        cache_url=run.cache_dir,
        student=run.student,
        loss=run.loss,
        data=run.data,
        train=run.train,
        output=run.output,
        observe=run.observe,
        seed=run.seed,
    )
    world = read_world()
    plan = forecast(inputs, world.size)
    if "dry_run" in command.switches:
        if world.is_first:
            print_forecast(inputs, plan)
        return 0
    if run.output.push:
        from pipeline.student.output.hub import require_hub_token

        require_hub_token()
    check_resources(inputs, plan)
    if "check" in command.switches:
        return 0
    folder = train_student(
        inputs, resolved_config=dump_yaml(run), command=command_line(PROG, arguments)
    )
    if world.is_first:
        print(f"student {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
