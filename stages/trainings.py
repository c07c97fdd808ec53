"""Trainings of one run side by side: forks of this process, which loads their libraries once."""

from __future__ import annotations

import importlib
import os
import selectors
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn, TextIO

from pipeline.errors import Interrupted, run_command
from pipeline.program import module_name

__all__ = ["Trainings", "load_libraries", "threads_of"]

_LIBRARIES = (
    "torch", "transformers", "transformers.models.auto.modeling_auto", "deepspeed",
    "pipeline.student.run", "pipeline.student.preflight", "pipeline.loss.head",
    "pipeline.cache.codec.kernels", "stages.train_student",
)  # fmt: skip
"""What a training imports, in pieces: 10 s of a core in all."""
_POLL_S = 0.2
_READ = 1 << 16


def load_libraries(goes_on: Callable[[], bool] = lambda: True) -> None:
    """Import what trainings need, one library after the other, for as long as `goes_on` says so.

    Computes nothing, so that none of their threads is there when this process is forked.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in _LIBRARIES:
        if not goes_on():
            return
        ours = name.startswith(("pipeline.", "stages."))
        importlib.import_module(module_name(name) if ours else name)


def threads_of(trainings: int, *, cores: int) -> int:
    """Return the threads of each of so many trainings; the same when some of them are done.

    Threads change the last bits of a sum: a run that goes on must have as many as before.
    """
    return max(1, cores // max(1, trainings))


@dataclass(slots=True)
class _Running:
    """One fork."""

    name: str
    pid: int
    code: int | None = None
    """Its exit code once it has ended, negative where a signal ended it."""


@dataclass(slots=True)
class _Printed:
    """What one of them prints to standard output, or to standard error."""

    name: str
    shown: TextIO
    line: bytes = b""
    """The beginning of a line whose end is still to come."""

    def add(self, data: bytes) -> None:
        """Show the lines that are complete; no data: the rest."""
        *lines, self.line = (self.line + data).split(b"\n")
        if not data and self.line:
            lines, self.line = [self.line], b""
        for line in lines:
            text = line.decode(errors="replace")
            print(f"{self.name}: {text}" if text else "", file=self.shown, flush=True)


@dataclass
class Trainings:
    """Runs `main` in forks, several at a time; their lines come out with their names before them.

    On a CPU two processes with a core each do more than one with both: much of a step and of a
    start is of one core. Not for where a GPU is used: forks cannot share one.
    """

    main: Callable[[Sequence[str]], int]
    at_once: int
    """Processes at a time."""
    prepare: Callable[[], None] = load_libraries
    """Called once, before the first fork."""
    failed: tuple[str, int] | None = None
    """Name and exit code of the first that failed."""
    _all: list[_Running] = field(default_factory=list)
    _pipes: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    @contextmanager
    def open(self) -> Iterator[Trainings]:
        """While open, they may be started; when an error leaves, those that run are stopped first.

        Raises:
            Interrupted: SIGTERM came.
        """
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            yield self
        except BaseException:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._stop()
            self.finish()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
            self._pipes.close()

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Start one, as soon as there is room for it; does nothing where one has failed."""
        while len(self._alive()) >= self.at_once:
            self._wait()
        if self.failed is not None:
            return
        if not self._all:
            self.prepare()
        ends = os.pipe(), os.pipe()
        streams = sys.stdout, sys.stderr
        for stream in streams:
            stream.flush()
        with warnings.catch_warnings():
            # Python 3.12 warns of threads; those there are numpy's, which knows of forks.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            self._become(arguments, [write for _, write in ends])
        self._all.append(_Running(name, pid))
        for (read, write), stream in zip(ends, streams, strict=True):
            os.close(write)
            self._pipes.register(read, selectors.EVENT_READ, _Printed(name, stream))

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Show what they print until `ready`, or until the last that was started has ended."""
        while self._all and self._all[-1].code is None and not ready():
            self._wait()

    def finish(self) -> None:
        """Show what they print until all have ended; where one fails, the others are stopped."""
        while self._alive():
            self._wait()
        # A process that one of them has left behind may have its pipes: no waiting for their end.
        while self._show(0):
            pass

    def _stop(self) -> None:
        """Let those that run write a checkpoint and end."""
        for one in self._alive():
            os.kill(one.pid, signal.SIGTERM)

    def _alive(self) -> list[_Running]:
        return [one for one in self._all if one.code is None]

    def _wait(self) -> None:
        """Show what has been printed, or wait a moment; take note of those that have ended."""
        self._show(_POLL_S)
        for one in self._alive():
            pid, status = os.waitpid(one.pid, os.WNOHANG)
            if not pid:
                continue
            one.code = os.waitstatus_to_exitcode(status)
            if one.code and self.failed is None:
                while self._show(0):  # what it said, before what is said of it
                    pass
                self.failed = one.name, one.code
                self._stop()

    def _show(self, timeout: float) -> bool:
        """Show what has been printed; return whether there was anything, or an end."""
        found = self._pipes.select(timeout)
        for key, _ in found:
            printed: Any = key.data
            data = os.read(key.fd, _READ)
            printed.add(data)
            if not data:
                self._pipes.unregister(key.fd)
                os.close(key.fd)
        return bool(found)

    def _become(self, arguments: Sequence[str], writes: Sequence[int]) -> NoReturn:
        """Be the process of a training, to its end."""
        code = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for key in self._pipes.get_map().values():  # the others'
                os.close(key.fd)
            for write, number in zip(writes, (1, 2), strict=True):
                os.dup2(write, number)
            # As an interpreter of its own: what is printed before an error comes before it.
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            code = run_command(lambda: self.main(arguments))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Interrupted("stopped by SIGTERM", do="run the same command again; it goes on from there")
