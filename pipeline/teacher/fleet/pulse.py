"""Whether a teacher that was asked for tokens brings any: a process whose device is stuck ends.

A call that hangs on a device raises nothing and hears no signal. Its worker would keep its shard
for ever, as leases are kept by another thread.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import EngineStalled
from pipeline.teacher.engines.base import CaptureRequest, Engine

__all__ = ["PULSE_FILE", "Pulse", "WatchedEngine"]

PULSE_FILE = "DISTILL_PULSE_FILE"
"""Variable that names a file for a pod's liveness probe; touched while nothing is stuck."""
_LOADING = 6
"""How many times longer than a token the loading may take: weights come over a network, kernels
are compiled."""
_LOOKS = 10
_LONGEST_PAUSE_S = 10.0


def _end(error: EngineStalled) -> None:
    """End the process past everything that could wait for the device: other threads, `atexit`."""
    os.write(sys.stderr.fileno(), f"error: {error}\n".encode())
    os._exit(error.exit_code)


class Pulse:
    """Tokens of one process's teacher. Without `stall_s` it watches nothing.

    Used as a context manager it looks on a thread of its own, which also touches the file. Between
    calls of the teacher nothing is expected: a worker may wait for others as long as it likes.
    """

    def __init__(
        self,
        stall_s: float | None = None,
        *,
        file: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[EngineStalled], None] = _end,
    ) -> None:
        """Watch nothing before `expecting`.

        Args:
            stall_s: seconds without a token after which the teacher counts as stuck.
            file: touched every few seconds while it is not; None: none.
            clock: seconds, monotonic.
            end: ends the process; called from the pulse's own thread.
        """
        self._stall_s = stall_s
        self._file = None if file is None else Path(file)
        self._clock = clock
        self._end = end
        self._lock = threading.Lock()
        self._since: float | None = None
        """When the last token came, or was first expected; None where none is expected."""
        self._allowed_s = 0.0
        self._doing = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="teacher-pulse", daemon=True)

    @contextlib.contextmanager
    def expecting(self, *, loading: bool = False) -> Iterator[None]:
        """Expect tokens while open; of a teacher that is being loaded, its end within six times."""
        with self._lock:
            self._since = self._clock()
            self._allowed_s = (self._stall_s or 0.0) * (_LOADING if loading else 1)
            self._doing = "is not loaded" if loading else "has finished no token"
        try:
            yield
        finally:
            with self._lock:
                self._since = None

    def advance(self) -> None:
        """Note that tokens have come, or a step of the teacher has ended."""
        with self._lock:
            if self._since is not None:
                self._since = self._clock()

    @property
    def is_alive(self) -> bool:
        """Whether nothing is expected, or something came lately; leases beat only then."""
        return self._stuck_s() is None

    def look(self) -> None:
        """End the process where the teacher is stuck; else touch the file."""
        stuck_s = self._stuck_s()
        if stuck_s is not None:
            self._end(
                EngineStalled(
                    f"the teacher {self._doing} for {stuck_s:.0f} s: its device, or the link "
                    "between devices, hangs",
                    do="look after the device; the shard is taken over, and the same command goes "
                    "on (a teacher that is only slow needs a larger --teacher.stall_s)",
                )
            )
        elif self._file is not None:
            with contextlib.suppress(OSError):  # of a folder that is gone: the probe says so
                self._file.touch()

    def __enter__(self) -> Self:
        """Look from now on, where there is anything to look at."""
        if self._stall_s is not None or self._file is not None:
            self.look()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Look no more."""
        self._stop.set()

    def _stuck_s(self) -> float | None:
        """Return the seconds without a token where they are too many."""
        with self._lock:
            if self._stall_s is None or self._since is None:
                return None
            passed_s = self._clock() - self._since
            return passed_s if passed_s >= self._allowed_s else None

    def _run(self) -> None:
        pause_s = min(_LONGEST_PAUSE_S, (self._stall_s or _LONGEST_PAUSE_S * _LOOKS) / _LOOKS)
        while not self._stop.wait(pause_s):
            self.look()


class WatchedEngine:
    """An engine of which every call is watched, whoever makes it."""

    def __init__(self, engine: Engine, pulse: Pulse) -> None:
        """Keep both."""
        self._engine = engine
        self._pulse = pulse
        self.vocab_size = engine.vocab_size
        self.attention = engine.attention

    def capture(
        self,
        requests: Sequence[CaptureRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Return the engine's columns of each request, in order."""

        def count(tokens: int) -> None:
            self._pulse.advance()
            if on_tokens is not None and tokens:
                on_tokens(tokens)

        with self._pulse.expecting():
            return self._engine.capture(requests, on_tokens=count)

    def close(self) -> None:
        """Free the device."""
        self._engine.close()
