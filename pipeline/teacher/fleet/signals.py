"""SIGTERM as an exception: what is committed stays, the same command goes on."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import Interrupted

__all__ = ["interruptible", "stop_if_asked"]

_GRACE_S = 20.0
"""From SIGTERM to the end without a farewell, where the main thread hangs in a call that hears no
signal (a dead mount, a stuck device). Kubernetes kills after 30 s by default."""
_asked = threading.Event()


@contextmanager
def interruptible(grace_s: float = _GRACE_S) -> Iterator[None]:
    """While open, SIGTERM raises `Interrupted` in the main thread (Kubernetes sends it first).

    A library that catches every exception may swallow it; `stop_if_asked` raises it again. If the
    process is still there after `grace_s`, it ends at once, with the same message and exit code:
    every file of a cache is whole at any instant.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        if not _asked.is_set():  # once: a second signal must not break the farewell of the first
            _asked.set()
            raise _interrupted()

    _asked.clear()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python runs handlers between two steps of the main thread; the byte is written at once.
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = signal.signal(signal.SIGTERM, stop)
    closed = threading.Event()
    threading.Thread(
        target=_watch, args=(reader, closed, grace_s), name="sigterm-watch", daemon=True
    ).start()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(wakeup)
        closed.set()
        os.close(writer)


def stop_if_asked() -> None:
    """Raise `Interrupted` where SIGTERM has come.

    Raises:
        Interrupted: it has.
    """
    if _asked.is_set():
        raise _interrupted()


def _watch(reader: int, closed: threading.Event, grace_s: float) -> None:
    """End the process where it outlives SIGTERM by the grace."""
    while received := os.read(reader, 64):
        if signal.SIGTERM in received:
            if not closed.wait(grace_s):
                os.write(sys.stderr.fileno(), f"error: {_interrupted()}\n".encode())
                os._exit(Interrupted.exit_code)
            break
    os.close(reader)


def _interrupted() -> Interrupted:
    return Interrupted(
        f"stopped by {signal.Signals.SIGTERM.name}",
        do="run the same command again; finished shards are kept",
    )
