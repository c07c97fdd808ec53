"""SIGTERM as an exception: what is committed stays, the same command goes on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import Interrupted

__all__ = ["interruptible"]


@contextmanager
def interruptible() -> Iterator[None]:
    """While open, SIGTERM raises `Interrupted` in the main thread (Kubernetes sends it first)."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(
            f"stopped by {signal.Signals(number).name}",
            do="run the same command again; finished shards are kept",
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
