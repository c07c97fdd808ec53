"""The whole path on one machine: teacher to cache, cache to student, a control, a report."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.api.settings import StudentRun
from pipeline.config import Settings, option, parse_command
from pipeline.config.command import command_line
from pipeline.config.files import read_config_file
from pipeline.errors import ConfigError, RowsQuarantined, run_command
from pipeline.models.device import may_use_gpu
from pipeline.program import command_name, module_name, target_name
from pipeline.storage.parallel import usable_cores
from pipeline.student.engine.launch import torchrun_arguments
from pipeline.student.settings.student import WAY_FILE
from stages.parts import Parts, StageFailed, Training
from stages.report import print_report, write_run_report
from stages.steps import Step, Steps
from stages.train_student import main as train_student
from stages.trainings import Trainings, load_libraries, threads_of

__all__ = ["CONTROL", "DistillRun", "main", "same_start", "trainer"]

PROG = command_name("stages.distill")
CONTROL = ("--alpha", "0")
"""Flags of the control: it learns from the text alone."""
_POLL_S = 0.2


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
    side_by_side: bool = option(
        True,
        "on a CPU and with one process: train all students at the same time, each on its part of "
        "the cores (false: one after the other, each on all)",
    )
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
    from pipeline.observe.trackers import check_trackers

    student_run = parse_command(
        StudentRun, ["--config", run.student_config], prog="stage two", description=""
    ).settings
    check_trackers(student_run.observe.report_to)  # before the teacher's work, not after it
    if run.dense:
        _check_dense(run)
    started = time.monotonic()
    root = Path(run.run_dir)
    cache, student = root / "cache", root / "student"
    teacher = [
        run.teacher_python, "-m", module_name("stages.cache_teacher"),
        "--config", run.teacher_config, "--cache_dir", str(cache),
    ]  # fmt: skip
    side_by_side = run.nproc == 1 and run.side_by_side and not may_use_gpu()
    path = Parts(Steps(root), of=5 if run.dense else 4)
    quarantined = path.stage(
        "teacher: reads the corpus once", teacher, run.teacher_config, cache,
        also=RowsQuarantined.exit_code, meanwhile=_prepare if side_by_side else None,
    )  # fmt: skip
    trainings = _trainings(run, cache)
    if side_by_side:
        cores = usable_cores()
        path.train(
            trainings,
            run.student_config,
            Trainings(_with_threads(len(trainings), cores), at_once=cores),
        )
    else:
        for number, part in enumerate(trainings):
            flags = part.arguments()
            path.stage(
                part.title, [*trainer(run.nproc), *flags], run.student_config, part.output,
                # One process says what is wrong once; a launcher says it once a rank.
                before=[*trainer(1), *flags, "--check"] if run.nproc > 1 > number else (),
            )  # fmt: skip
    page = _report(path, root, command=command_line(PROG, arguments))
    minutes = (time.monotonic() - started) / 60
    another = f"--cache_dir {cache} --output_dir {root / 'student-t2'} --temperature 2"
    own = "--teacher_model NAME --dataset_name NAME_OR_FILE"
    print(
        f"""
report    {page}
student   {student / "model"}   (AutoModelForCausalLM.from_pretrained, vLLM)
cache     {cache}   ({command_name("pipeline.cache")} inspect {cache})
in        {minutes:.1f} minutes; the same command again redoes nothing

next      another student from the same cache:
              {target_name("train-student", another)}
          your own teacher and corpus, looked at first:
              {target_name("preview", own)}
              {target_name("cache-teacher", f"{own} --cache_dir FOLDER_OR_URL")}
          what a run would take:  add --dry-run"""
    )
    if quarantined:
        raise StageFailed("the cache lacks the rows that stage one has listed above", quarantined)
    return 0


def _trainings(run: DistillRun, cache: Path) -> list[Training]:
    """Return the student, its control and, if asked for, the student of all entries."""
    root = cache.parent
    student, control, dense = root / "student", root / "control", root / "dense"
    data = ["--config", run.student_config, "--cache_dir", str(cache)]

    def again(output: Path, *flags: str) -> Callable[[], Sequence[str]]:
        # Asked for when the student is made: only then it is known where it begins.
        return lambda: [*data, *same_start(student), "--output_dir", str(output), *flags]

    trainings = [
        Training(
            "student: learns from the cache", student,
            lambda: [*data, "--output_dir", str(student)], ready=_is_rewritten(student),
        ),
        Training(
            "control: the same student and steps, cross-entropy alone", control,
            again(control, *CONTROL),
        ),
    ]  # fmt: skip
    if run.dense:
        title = "dense: the same student and steps, all entries of a target"
        trainings.append(Training(title, dense, again(dense, "--data.max_entries", "none")))
    return trainings


def _prepare(goes_on: Callable[[], bool]) -> None:
    """Make ready what the trainings need, and the teacher soon, while the teacher loads."""
    from stages.loops import compiling

    with compiling():
        load_libraries(goes_on)
        while goes_on():
            time.sleep(_POLL_S)


def _with_threads(trainings: int, cores: int) -> Callable[[Sequence[str]], int]:
    """Return stage two for one of several at a time: on its part of the cores."""
    if os.environ.get("OMP_NUM_THREADS"):  # chosen by whoever started us
        return train_student
    threads = str(threads_of(trainings, cores=cores))
    return lambda arguments: train_student([*arguments, "--train.cpu_threads", threads])


def _is_rewritten(student: Path) -> Callable[[], bool]:
    """Return what says whether a training has made its student, since this was called."""

    def time_ns() -> int:
        file = student / WAY_FILE
        return file.stat().st_mtime_ns if file.exists() else 0

    before = time_ns()
    return lambda: time_ns() != before


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
        return [sys.executable, "-m", module_name("stages.train_student")]
    module = module_name("stages.train_student")
    return [sys.executable, *torchrun_arguments(nproc), "-m", module]


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


def _report(path: Parts, root: Path, *, command: str) -> Path:
    """Write the report, or print what it says; return the page's path."""
    step = Step("report", [command], root / "report")
    if path.is_done("report", step):
        return print_report(root)
    page = write_run_report(root, command=command)
    path.steps.record(step)
    return page


if __name__ == "__main__":
    sys.exit(run_command(main))
