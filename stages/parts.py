"""The parts of a command that runs several stages: each its own process, passed over where done."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError, DistillError
from stages.steps import Step, Steps
from stages.trainings import Trainings

__all__ = ["Parts", "StageFailed", "Training"]


@dataclass(frozen=True, slots=True)
class Training:
    """A part that trains a student, beside others."""

    title: str
    output: Path
    arguments: Callable[[], Sequence[str]]
    """Of stage two; asked for when the part before it is ready."""
    ready: Callable[[], bool] = lambda: True
    """Whether the parts after it can begin, though it goes on."""

    def step(self, config: str) -> Step:
        """Return it as a step that reads `config`."""
        return Step(self.output.name, self.arguments(), self.output, config)


@dataclass(slots=True)
class Parts:
    """The parts of the run, each passed over where it is done and untouched since."""

    steps: Steps
    of: int
    """Parts in all."""
    number: int = 0
    """Of the part."""

    def is_done(self, title: str, step: Step) -> bool:
        """Print the part's title and return whether there is nothing to do."""
        self.number += 1
        done = self.steps.is_done(step)
        print(f"== {self.number}/{self.of} {title}" + (": done" if done else ""), flush=True)
        return done

    def stage(
        self,
        title: str,
        command: Sequence[str],
        config: str,
        output: Path,
        *,
        before: Sequence[str] = (),
        also: int = 0,
        meanwhile: Callable[[Callable[[], bool]], None] | None = None,
    ) -> int:
        """Run one stage as its own process, as a cluster would; stop where it fails.

        Args:
            title: of the part.
            command: that does it.
            config: file that it reads.
            output: folder that it writes.
            before: a command that must succeed first.
            also: an exit code that is no failure; the part is not done then.
            meanwhile: what this process does beside it, for as long as the part goes on.

        Returns:
            0, or `also`.
        """
        name = output.relative_to(self.steps.folder).as_posix()
        step = Step(name, command, output, config)
        if self.is_done(title, step):
            return 0
        code = 0
        for part in filter(None, (before, command)):
            try:
                code = _run(part, meanwhile)
            except OSError as error:  # such as a --teacher_python that is not there
                raise ConfigError(
                    f"{part[0]}: cannot be started ({error.strerror})",
                    expected="the interpreter of an environment that `make setup` has made",
                ) from None
            if code not in (0, also):
                # The stage has said what was wrong; its exit code is ours.
                raise StageFailed(f"{part[2]} ended with exit code {code}", code)
        if code == 0:
            self.steps.record(step)
        return code

    def train(self, parts: Sequence[Training], config: str, trainings: Trainings) -> None:
        """Run trainings side by side; stop all of them where one fails.

        Args:
            parts: in their order; each begins when the one before it is ready.
            config: file that they read.
            trainings: what runs them.
        """
        begun: list[Step] = []
        with trainings.open():
            for part in parts:
                step = part.step(config)
                if self.is_done(part.title, step):
                    continue
                begun.append(step)
                trainings.start(part.output.name, part.arguments())
                trainings.wait_until(part.ready)
                if trainings.failed is not None:
                    break
            trainings.finish()
        if trainings.failed is not None:
            name, code = trainings.failed
            raise StageFailed(f"the training of the {name} ended with exit code {code}", code)
        for step in begun:
            self.steps.record(step)


def _run(command: Sequence[str], meanwhile: Callable[[Callable[[], bool]], None] | None) -> int:
    """Return the exit code of a command, beside which this process may do something."""
    if meanwhile is None:
        return subprocess.run(command, check=False).returncode
    with subprocess.Popen(command) as process:
        try:
            meanwhile(lambda: process.poll() is None)
            return process.wait()
        except BaseException:
            process.kill()
            raise


class StageFailed(DistillError):
    """A stage ended with an error, which it has told."""

    def __init__(self, found: str, code: int) -> None:
        """Say what ended; `code` is its exit code, negative where a signal ended it."""
        super().__init__(found, do="correct what it says above and run the same command again")
        self.exit_code = code if code > 0 else 128 - code  # as a shell says it of a signal
