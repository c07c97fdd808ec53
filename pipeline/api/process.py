"""A stage in a process of its own, its lines shown as they come, its error raised here.

A process of its own gives GPU memory back when it ends, keeps DeepSpeed's and vLLM's global state
out of a notebook, and is the very command that a shell would run.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO, TextIO

from pipeline.errors import ConfigError, DistillError
from pipeline.program import module_name

__all__ = ["StageFailed", "run_stage"]

_ERROR = "error: "
_LINES_KEPT = 200


class StageFailed(DistillError):
    """A stage ended with an error; `exit_code` is its own (see `stages/README.md`)."""

    def __init__(self, found: str, code: int) -> None:
        """Keep the code: a positive one, of a signal 128 and its number as in a shell."""
        super().__init__(found)
        self.exit_code = code if code >= 0 else 128 - code


def run_stage(
    module: str,
    arguments: Sequence[str],
    *,
    python: str = sys.executable,
    launcher: Sequence[str] = (),
    allowed: Sequence[int] = (),
) -> int:
    """Run `python -m module` to its end and show what it prints.

    Args:
        module: such as `stages.train_student`.
        arguments: its flags.
        python: interpreter of the stage's environment.
        launcher: arguments of Python that start several processes, such as those of torchrun.
        allowed: exit codes that are no error.

    Returns:
        0, or one of `allowed`.

    Raises:
        ConfigError: the stage found a mistake in its configuration.
        StageFailed: it ended with another error.
    """
    command = [python, *launcher, "-m", module_name(module), *arguments]
    last: deque[str] = deque(maxlen=_LINES_KEPT)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        bufsize=1,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    # Through sys.stdout, which a notebook replaces; a child writes to the file descriptors.
    copies = [
        _copy(process.stdout, lambda line: _show(line, sys.stdout)),
        _copy(process.stderr, lambda line: _show_error(line, last)),
    ]
    try:
        code = process.wait()
    except BaseException:
        process.terminate()  # the stages stop cleanly; the same call goes on
        process.wait()
        raise
    finally:
        for copy in copies:
            copy.join()
    if code == 0 or code in allowed:
        return code
    message = _message(last)
    if code == ConfigError.exit_code:
        raise ConfigError(message)
    raise StageFailed(message or f"{module} ended with exit code {code}", code)


def _copy(pipe: IO[str], show: Callable[[str], object]) -> threading.Thread:
    def run() -> None:
        with pipe:
            for line in pipe:
                show(line)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _show_error(line: str, last: deque[str]) -> None:
    last.append(line)
    _show(line, sys.stderr)


def _show(line: str, stream: TextIO) -> None:
    stream.write(line)
    stream.flush()


def _message(lines: Sequence[str]) -> str:
    """Return the stage's one message: from its `error: ` to the end."""
    starts = [number for number, line in enumerate(lines) if line.startswith(_ERROR)]
    return "".join(list(lines)[starts[-1] :]).removeprefix(_ERROR).strip() if starts else ""
