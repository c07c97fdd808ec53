"""The whole path on one machine: teacher to cache, cache to student, a control, a report."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Settings, option, parse_command
from pipeline.config.command import command_line
from pipeline.config.files import read_config_file
from pipeline.errors import ConfigError, DistillError, run_command
from stages.report import write_run_report

__all__ = ["CONTROL", "ROWS_QUARANTINED", "DistillRun", "main", "same_start", "trainer"]

PROG = "python -m stages.distill"
CONTROL = ("--alpha", "0")
"""Flags of the control: it learns from the text alone."""
ROWS_QUARANTINED = 3
"""Exit code of a stage one that lacks some rows: the cache can be used without them."""


class DistillRun(Settings):
    """Where things go and which configurations are used; stage settings are in those files."""

    run_dir: str = option("runs/default", "folder for cache, student, control and report")
    teacher_config: str = option("stages/configs/teacher.yaml", "configuration of stage one")
    student_config: str = option("stages/configs/student.yaml", "configuration of stage two")
    dense: bool = option(
        False,
        "train a third student, from all entries of a target where student_config takes the "
        "largest (data.max_entries)",
    )
    nproc: int = option(1, "processes that train", ge=1)
    teacher_python: str = option(sys.executable, "interpreter of stage one's environment")


def main(argv: Sequence[str] | None = None) -> int:
    """Run both stages, the control and the report; finished parts are not done again."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    run = parse_command(
        DistillRun,
        arguments,
        prog=PROG,
        description=__doc__ or "",
        examples=[f"{PROG}", f"{PROG} --run_dir runs/mine --student_config my-student.yaml"],
    ).settings
    if run.dense:
        _check_dense(run)
    started = time.monotonic()
    root = Path(run.run_dir)
    cache, student, control = root / "cache", root / "student", root / "control"
    teacher = [
        run.teacher_python, "-m", "stages.cache_teacher", "--config", run.teacher_config,
        "--cache_dir", str(cache),
    ]  # fmt: skip
    training = trainer(run.nproc)
    data = ["--config", run.student_config, "--cache_dir", str(cache)]
    distilled = [*data, "--output_dir", str(student)]
    of = 5 if run.dense else 4
    quarantined = _stage(f"1/{of} teacher: reads the corpus once", teacher, also=ROWS_QUARANTINED)
    if run.nproc > 1:
        # One process says what is wrong once; a launcher says it once a rank.
        _stage("student: checked", [*trainer(1), *distilled, "--check"])
    _stage(f"2/{of} student: learns from the cache", [*training, *distilled])
    again = [*training, *data, *same_start(student)]
    controlled = [*again, "--output_dir", str(control), *CONTROL]
    _stage(f"3/{of} control: the same student and steps, cross-entropy alone", controlled)
    if run.dense:
        densely = [*again, "--output_dir", str(root / "dense"), "--data.max_entries", "none"]
        _stage(f"4/{of} dense: the same student and steps, all entries of a target", densely)
    print(f"== {of}/{of} report", flush=True)
    page = write_run_report(root, command=command_line(PROG, arguments))
    minutes = (time.monotonic() - started) / 60
    print(
        f"""
report    {page}
student   {student / "model"}   (AutoModelForCausalLM.from_pretrained, vLLM)
cache     {cache}   (python -m pipeline.cache inspect {cache})
in        {minutes:.1f} minutes; the same command again redoes nothing

next      another student from the same cache:  make train-student ARGS="--cache_dir {cache} \\
              --output_dir {root / "student-t2"} --temperature 2 --alpha 0.5"
          your own teacher and corpus:          make cache-teacher \\
              CONFIG=stages/configs/sample-teacher.yaml ARGS="--teacher_model NAME \\
              --dataset_name NAME_OR_FILE --cache_dir FOLDER_OR_URL"
          what a run would take:                add --dry-run to ARGS"""
    )
    if quarantined:
        raise _StageFailed("the cache lacks the rows that stage one has listed above", quarantined)
    return 0


def same_start(student: Path) -> list[str]:
    """Return the flags of a run that begins as a trained student did, and is not scored there.

    Args:
        student: the student's output folder; where it was built from another model, its first
            weights are kept there.
    """
    flags = ["--train.evaluate_before", "false"]
    init = student / "init"
    if init.exists():
        flags += [
            "--student_model", str(init), "--student.keep_layers", "none",
            "--student.reconstruct", "none",
        ]  # fmt: skip
    return flags


def trainer(nproc: int) -> list[str]:
    """Return the command of stage two, without its flags."""
    if nproc == 1:
        return [sys.executable, "-m", "stages.train_student"]
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(nproc), "-m", "stages.train_student",
    ]  # fmt: skip


def _check_dense(run: DistillRun) -> None:
    data = read_config_file(run.student_config).get("data")
    if not isinstance(data, dict) or data.get("max_entries") is None:
        raise ConfigError(
            f"dense: found true with a student that takes all entries ({run.student_config}: "
            "data.max_entries is none)",
            expected="data.max_entries, the entries of the student beside the dense one",
            do="set it below capture.top_k, as stages/configs/long-student.yaml does, or leave "
            "--dense out",
        )


def _stage(title: str, command: list[str], *, also: int = 0) -> int:
    """Run one stage as its own process, as a cluster would; stop where it fails.

    Returns:
        0, or the exit code that `also` allows.
    """
    print(f"== {title}", flush=True)
    result = subprocess.run(command, check=False)
    if result.returncode not in (0, also):
        # The stage has said what was wrong; its exit code is ours.
        raise _StageFailed(
            f"{command[2]} ended with exit code {result.returncode}", result.returncode
        )
    return result.returncode


class _StageFailed(DistillError):
    def __init__(self, found: str, code: int) -> None:
        super().__init__(found, do="correct what it says above and run the same command again")
        self.exit_code = code if code > 0 else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
