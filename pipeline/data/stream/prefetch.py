"""A background thread that runs ahead of its consumer by a bounded number of items."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

from pipeline.errors import StoreError

__all__ = ["Patience", "Prefetcher"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a consumer waits for one item, and what it says meanwhile."""

    warning_s: float
    """Then a line is logged; and again after twice, four times as long."""
    timeout_s: float
    """Then the wait ends with an error."""
    doing: Callable[[], str]
    """What the thread is waiting for, in words; asked at the moment of the line."""


class Prefetcher(Generic[T]):
    """An iterator over `items` that a thread fills; stops with `close()` or at the end of `with`.

    An exception of the thread is raised in the consumer, after the items made before it.
    """

    def __init__(self, items: Iterator[T], *, ahead: int, patience: Patience | None = None) -> None:
        """Start the thread.

        Args:
            items: consumed by the thread only.
            ahead: items that may wait at one time.
            patience: with a thread that hangs; None waits indefinitely, in silence.
        """
        self._patience = patience
        self.wait_seconds = 0.0
        """Time the consumer has spent waiting, the first item included."""
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._hangs = False
        self._ended = False
        self._thread = threading.Thread(
            target=self._fill, args=(items,), name="data-prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        """Return itself."""
        return self

    def __next__(self) -> T:
        """Return the next item, waiting for it if need be.

        Raises:
            StoreError: it did not come in time; the thread is left to itself.
        """
        if self._ended:
            raise StopIteration
        started = time.perf_counter()
        try:
            item, error = self._get()
        finally:
            self.wait_seconds += time.perf_counter() - started
        if error is None:
            assert item is not None
            return item
        self.close()
        raise error

    def is_ready(self) -> bool:
        """Whether the next item, or the end, is there."""
        return not self._queue.empty()

    def close(self) -> None:
        """Stop the thread and wait for it, unless it hangs; safe to call twice."""
        self._ended = True
        self._stop.set()
        self._thread.join(0 if self._hangs else None)

    def __enter__(self) -> Prefetcher[T]:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _get(self) -> tuple[T | None, BaseException | None]:
        """Take an entry from the queue, with patience."""
        if self._patience is None:
            return self._queue.get()
        waited, pause = 0.0, min(self._patience.warning_s, self._patience.timeout_s)
        while True:
            try:
                return self._queue.get(timeout=pause)
            except queue.Empty:
                waited += pause
            if waited >= self._patience.timeout_s:
                self._hangs = True
                raise StoreError(
                    f"no data for {waited:g} s: {self._patience.doing()}",
                    expected=f"a step's rows within {self._patience.timeout_s:g} s "
                    "(data.stall_timeout_s)",
                    do="check the store or the mount, then run the same command again; it goes on "
                    "from the last complete checkpoint",
                )
            _log.warning("waiting for data for %g s: %s", waited, self._patience.doing())
            pause = min(waited, self._patience.timeout_s - waited)

    def _fill(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put((item, None)):
                    return
            end: BaseException = StopIteration()
        except BaseException as error:
            end = error
        self._put((None, end))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        """Wait for room; False once the consumer has closed."""
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
