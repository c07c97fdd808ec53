"""Apply a function to many shards in threads, with a bounded number in memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["default_workers", "in_threads"]

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """Return the threads for reading shards: the cores, at most 8 (each holds one shard)."""
    return max(1, min(8, os.cpu_count() or 1))


def in_threads(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield `function(item)` in the items' order; at most `workers` + 1 are started ahead.

    Checksums, zstd, Parquet and waiting for a store release the interpreter's lock.
    """
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="shards")
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
