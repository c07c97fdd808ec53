"""Stage two: train a student from a cache; the teacher is never needed."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from pipeline.api.settings import StudentRun, TeacherRun
from pipeline.config import dump_yaml, parse_command
from pipeline.config.command import command_line
from pipeline.errors import ConfigError, run_command
from pipeline.program import command_name, module_name
from pipeline.student.engine.launch import SHUTDOWN_TIMEOUT_S, prepare_environment
from stages.defaults import STUDENT_DEFAULT, report_student_default

__all__ = ["main"]

PROG = command_name("stages.train_student")


def main(argv: Sequence[str] | None = None) -> int:
    """Run stage two; the same command again resumes where it stopped."""
    prepare_environment()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parse_command(
        StudentRun,
        arguments,
        prog=PROG,
        description=__doc__ or "",
        switches={
            "dry_run": "print the plan (samples, tokens, steps, memory, time from a short "
            "calibration) and exit",
            "check": "validate configuration, cache, student and output folder as training would, "
            "without its weights, then exit (before a launcher of several processes, which would "
            "print each message once a process)",
        },
        examples=[
            PROG,
            f"torchrun --standalone --nproc-per-node 2 --shutdown-timeout {SHUTDOWN_TIMEOUT_S} -m "
            f"{module_name('stages.train_student')}",
            f"{PROG} --cache_dir s3://bucket/cache --student_model Qwen/Qwen2-1.5B "
            "--output_dir /fsx/student --temperature 2 --alpha 0.5",
            f"{PROG} --dry-run --device h100 --devices 8",
        ],
        elsewhere={"stage one, cache-teacher": TeacherRun},
        default=STUDENT_DEFAULT,
    )
    run = command.settings
    from pipeline.observe.logs import configure_logging

    configure_logging(run.observe.log_level)
    report_student_default(command)
    from pipeline.student.estimate import estimate, print_estimate
    from pipeline.student.inputs import open_inputs
    from pipeline.student.preflight import preflight
    from pipeline.student.run import train_student
    from pipeline.student.training.distributed import read_distributed

    dry_run, device = "dry_run" in command.switches, run.forecast.named
    if device is not None and not dry_run:
        raise ConfigError(
            f"forecast.device: found {run.forecast.device} without --dry-run",
            expected="both, for a forecast, or neither, for a training",
        )
    inputs = open_inputs(run)
    distributed = read_distributed()
    check = "check" in command.switches
    processes = distributed.world_size if device is None else run.forecast.devices
    if (dry_run or check) and device is None and processes == 1:
        processes = run.train.sequence_parallel_size  # a launcher will start as many, or more
    expected = estimate(inputs, processes)
    if dry_run:
        if distributed.is_first:
            print_estimate(inputs, expected, device=device, devices=processes)
        return 0
    preflight(inputs, expected, distributed, only_checked=check)
    if check:
        return 0
    folder = train_student(
        inputs,
        resolved_config=dump_yaml(run, without=("forecast",)),
        command=command_line(PROG, arguments),
    )
    if distributed.is_first:
        print(f"student {folder}")
    return 0


def _leave(code: int) -> None:
    """End this process; one rank of several that has failed, at once.

    Taking torch down takes seconds. A peer that is started again meanwhile joins torchrun's
    rendezvous before torchrun sees this rank's end; agents then restart their ranks in place, and
    have hung so. What should start again is the pod.
    """
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(run_command(main))
