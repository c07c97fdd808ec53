"""How long the sparsifier has worked in this process, measured inside the engine's own call.

The engine makes one call for a shard; prefill, head and sparsifier alternate inside it. Around the
sparsifier the engines open `SPARSIFIER.running(device)`, and the worker reads `SPARSIFIER.seconds`
through `Shares.inside("teacher", "sparsifier", ...)`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["SPARSIFIER", "Stopwatch"]


class Stopwatch:
    """Adds up device time. Safe to read from other threads while it runs.

    A CPU works while Python waits, so its time is the clock's. A GPU works later: two events
    enclose its part of the stream, and are read once it has passed them, never waited for.
    """

    def __init__(self) -> None:
        """Start at 0."""
        self._lock = threading.Lock()
        self._done = 0.0
        self._pending: deque[tuple[Any, Any]] = deque()

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count what `device` does inside."""
        if device.type == "cuda":
            import torch

            stream = torch.cuda.current_stream(device)
            event: Any = torch.cuda.Event
            start, end = event(enable_timing=True), event(enable_timing=True)
            start.record(stream)
            yield
            end.record(stream)
            with self._lock:
                self._pending.append((start, end))
                self._collect()
            return
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        with self._lock:
            self._done += elapsed

    def seconds(self) -> float:
        """Return all seconds so far; never falls."""
        with self._lock:
            self._collect()
            return self._done

    def _collect(self) -> None:
        """Take in the events that the device has passed; they come in order."""
        while self._pending and self._pending[0][1].query():
            start, end = self._pending.popleft()
            self._done += start.elapsed_time(end) / 1000


SPARSIFIER = Stopwatch()
"""Of this process. With tensor parallelism each of vLLM's workers has its own."""
