"""The parts of a command that runs several stages: each its own process, passed over where done."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError, DistillError
from stages.steps import Step, Steps

__all__ = ["Parts", "StageFailed"]


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
    ) -> int:
        """Run one stage as its own process, as a cluster would; stop where it fails.

        Args:
            title: of the part.
            command: that does it.
            config: file that it reads.
            output: folder that it writes.
            before: a command that must succeed first.
            also: an exit code that is no failure; the part is not done then.

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
                code = subprocess.run(part, check=False).returncode
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


class StageFailed(DistillError):
    """A stage ended with an error, which it has told."""

    def __init__(self, found: str, code: int) -> None:
        """Say what ended; `code` is its exit code, negative where a signal ended it."""
        super().__init__(found, do="correct what it says above and run the same command again")
        self.exit_code = code if code > 0 else 128 - code  # as a shell says it of a signal
