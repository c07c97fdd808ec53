"""The student writes, the teacher scores what it wrote, the student learns from that; in rounds."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import field_validator

from pipeline.config import DefaultFile, Settings, option, parse_command
from pipeline.config.command import command_line
from pipeline.errors import ConfigError, Mistakes, RowsQuarantined, run_command
from pipeline.program import command_name
from stages.parts import Parts, StageFailed
from stages.round_commands import CORPUS, Part, RoundCommands, RoundFolder, Weights
from stages.round_results import read_scores, stop_reason, write_rounds_report
from stages.steps import Step, Steps

if TYPE_CHECKING:
    from pipeline.api.settings import StudentRun
    from pipeline.student.compatibility import TextKnown

__all__ = ["RoundsRun", "main"]

PROG = command_name("stages.rounds")
_DEFAULT = DefaultFile(
    str(Path(__file__).parent / "configs/rounds.yaml"),
    unless=("teacher_config", "student_config", "round_config", "start"),
)


class RoundsRun(Settings):
    """How many rounds, what each learns from, and when to stop; stage settings are in files."""

    run_dir: str = option("runs/rounds", "folder of the rounds and their report")
    rounds: int = option(2, "rounds at most", ge=1, le=1000)
    teacher_config: str = option(
        "stages/configs/rounds-teacher.yaml",
        "configuration of stage one: the teacher, the prompts, how responses are drawn (generate)",
    )
    student_config: str = option(
        "stages/configs/rounds-student.yaml", "configuration of stage two of the first student"
    )
    round_config: str | None = option(
        None,
        "configuration of stage two of a round; its student is the round before's (none: "
        "student_config)",
    )
    start: str = option(
        "corpus",
        "who writes in the first round: `corpus`, a student that student_config trains on the "
        "corpus's own text, or a hub id or model folder",
    )
    corpus_weight: float = option(
        0.0, "share of the corpus's own text in a round, where the round's own text has 1", ge=0
    )
    earlier_weight: float = option(
        0.0,
        "share of the text of the round before, where the round's own has 1; that of the round "
        "before it has the square, and so on",
        ge=0,
        le=1,
    )
    least_gain: float | None = option(
        None,
        "stop after a round that brings the student less than this closer to the teacher on its "
        "own held-out text, in nats of KL",
    )
    least_drift: float | None = option(
        None,
        "stop after a round that moves the student by less than this from the one that wrote, in "
        "nats a token of held-out text",
    )
    nproc: int = option(1, "processes that train", ge=1)
    teacher_python: str = option(sys.executable, "interpreter of stage one's environment")

    @field_validator("start")
    @classmethod
    def _named(cls, start: str) -> str:
        if not start.strip():
            raise ValueError("found nothing, expected corpus, a hub id or a model folder")
        return start


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rounds; finished parts are not done again."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parse_command(
        RoundsRun,
        arguments,
        prog=PROG,
        description=__doc__ or "",
        switches={"dry_run": "print the commands of every part, in their order, and exit"},
        examples=[
            PROG,
            f"{PROG} --rounds 3 --earlier_weight 0.5 --least_gain 0.01",
            f"{PROG} --start Qwen/Qwen3-0.6B --run_dir runs/mine",
        ],
        default=_DEFAULT,
    )
    run = command.settings
    seed = _check(run)
    root = Path(run.run_dir)
    commands = RoundCommands(
        root,
        teacher_config=run.teacher_config,
        first_config=run.student_config,
        round_config=run.round_config or run.student_config,
        start=run.start,
        seed=seed,
        weights=Weights(corpus=run.corpus_weight, earlier=run.earlier_weight),
        teacher_python=run.teacher_python,
        nproc=run.nproc,
    )
    if "dry_run" in command.switches:
        for part in commands.all_parts(run.rounds):
            print(f"# {part.title}\n{command_line(part.command[0], part.command[1:])}")
        return 0
    started = time.monotonic()
    parts = _Rounds(run, commands, Parts(Steps(root), of=commands.count(run.rounds)))
    reason = parts.go()
    page = parts.report(command=command_line(PROG, arguments), reason=reason)
    last = commands.folders(parts.done)[-1]
    print(
        f"""
report    {page}
student   {last.model}   (AutoModelForCausalLM.from_pretrained, vLLM)
rounds    {parts.done} ({reason})
in        {(time.monotonic() - started) / 60:.1f} minutes; the same command again redoes nothing"""
    )
    if parts.quarantined:
        raise StageFailed(
            "caches of the rounds lack the rows that stage one has listed above", parts.quarantined
        )
    return 0


def _check(run: RoundsRun) -> int:
    """Refuse configurations that cannot make rounds; return the seed of stage one."""
    from pipeline.api.settings import StudentRun, TeacherRun
    from pipeline.observe.trackers import check_trackers
    from pipeline.student.compatibility import TextKnown

    mistakes = Mistakes()
    teacher = None
    with mistakes.collected():
        teacher = parse_command(
            TeacherRun,
            ["--config", run.teacher_config, "--generate.enabled", "true"],
            prog="stage one",
            description="",
        ).settings
    if teacher is not None:
        if teacher.generate.writer is not None:
            mistakes.add(
                f"generate.writer: found {teacher.generate.writer} in {run.teacher_config}, "
                "expected none: the student of each round writes the next; --start names the first"
            )
        if not teacher.corpus.heldout_fraction:
            mistakes.add(
                f"corpus.heldout_fraction: found 0 in {run.teacher_config}, expected more: rounds "
                "are compared on held-out prompts"
            )
        writing = teacher.generate
        filtered = writing.temperature != 1 or writing.top_p < 1 or writing.top_k or writing.min_p
        if run.least_drift is not None and filtered:
            mistakes.add(
                f"least_drift: found {run.least_drift:g} with a filter or a generate.temperature "
                f"other than 1 in {run.teacher_config}, expected none: the drift estimates a KL "
                "only where responses are drawn as the student would write them"
            )
    corpus = TextKnown(is_written=False, logprobs=False)
    rounds_file = run.round_config or run.student_config
    texts = {rounds_file: [TextKnown(is_written=True, logprobs=True)]}
    if run.corpus_weight:
        texts[rounds_file].append(corpus)
    if run.start == CORPUS:
        texts.setdefault(run.student_config, []).append(corpus)
    for file, of_caches in texts.items():
        with mistakes.collected():
            student = parse_command(
                StudentRun, ["--config", file], prog="stage two", description=""
            ).settings
            check_trackers(student.observe.report_to)
            if teacher is not None:
                _check_served(file, student, teacher.capture.temperatures, of_caches, mistakes)
            if student.loss.cross_tokenizer != "reject":
                raise ConfigError(
                    f"loss.cross_tokenizer: found {student.loss.cross_tokenizer} in {file}",
                    expected="reject: the teacher scores the student's text by its ids",
                )
    mistakes.raise_any()
    assert teacher is not None
    return teacher.seed


def _check_served(
    file: str,
    student: StudentRun,
    grid: Sequence[float],
    texts: Sequence[TextKnown],
    mistakes: Mistakes,
) -> None:
    """Refuse what the caches to be made could not serve, before hours of the teacher."""
    from pipeline.student.compatibility import check_compatibility

    # Of the tail only the finished cache knows whether it fits.
    loss = student.loss.model_copy(update={"tail": "auto", "control_variate": None})
    for text in texts:
        try:
            check_compatibility(loss, student.data, grid=grid, rule=None, text=text)
        except ConfigError as error:
            for line in error.mistakes:
                mistakes.add(f"{file}: {line}")


class _Rounds:
    """The parts in their order, until the last round or a reason to stop."""

    def __init__(self, run: RoundsRun, commands: RoundCommands, parts: Parts) -> None:
        self._run = run
        self._commands = commands
        self._parts = parts
        self.done = 0
        """Rounds that are finished."""
        self.quarantined = 0
        """Stage one's exit code where a cache lacks rows."""

    def go(self) -> str:
        """Do what is missing; return why it stopped."""
        commands = self._commands
        for part in commands.before_rounds():
            self._do(part)
        for number in range(1, self._run.rounds + 1):
            for part in commands.round(number):
                self._do(part)
            self.done = number
            reason = self._reason()
            if reason is not None and number < self._run.rounds:
                return reason
        return "all that were asked for"

    def report(self, *, command: str, reason: str) -> Path:
        """Write the page and print its table, or print what it says."""
        from stages.report import print_report

        root = Path(self._run.run_dir)
        step = Step("report", [command, reason], root / "report")
        self._parts.number = self._parts.of - 1
        if self._parts.is_done("report", step):
            return print_report(root)
        page = write_rounds_report(
            root,
            self._commands.folders(self.done),
            corpus=self._commands.corpus if self._commands.has_corpus else None,
            command=command,
            reason=reason,
        )
        self._parts.steps.record(step)
        return page

    def _do(self, part: Part) -> None:
        code = self._parts.stage(
            part.title,
            part.command,
            part.config,
            part.output,
            before=part.check,
            also=RowsQuarantined.exit_code if part.may_lack_rows else 0,
        )
        self.quarantined = self.quarantined or code

    def _reason(self) -> str | None:
        folders: list[RoundFolder] = self._commands.folders(self.done)
        before, now = (read_scores(folder) for folder in folders[-2:])
        return stop_reason(
            before, now, least_gain=self._run.least_gain, least_drift=self._run.least_drift
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
