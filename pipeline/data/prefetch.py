"""A background thread that runs ahead of its consumer by a bounded number of items."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["Prefetcher"]

T = TypeVar("T")

_POLL_SECONDS = 0.1


class Prefetcher(Generic[T]):
    """An iterator over `items` that a thread fills; stops with `close()` or at the end of `with`.

    An exception of the thread is raised in the consumer, after the items made before it.
    """

    def __init__(self, items: Iterator[T], *, ahead: int) -> None:
        """Start the thread.

        Args:
            items: consumed by the thread only.
            ahead: items that may wait at one time.
        """
        self.wait_seconds = 0.0
        """Time the consumer has spent waiting, the first item included."""
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(
            target=self._fill, args=(items,), name="data-prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        """Return itself."""
        return self

    def __next__(self) -> T:
        """Return the next item, waiting for it if need be."""
        if self._ended:
            raise StopIteration
        started = time.perf_counter()
        item, error = self._queue.get()
        self.wait_seconds += time.perf_counter() - started
        if error is None:
            assert item is not None
            return item
        self.close()
        raise error

    def close(self) -> None:
        """Stop the thread and wait for it; safe to call twice."""
        self._ended = True
        self._stop.set()
        self._thread.join()

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
