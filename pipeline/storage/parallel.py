"""Apply a function to many shards in threads or processes, with a bounded number in memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

__all__ = ["default_workers", "in_processes", "in_threads"]

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """Return the threads for reading shards: the cores, at most 8 (each holds one shard)."""
    return max(1, min(8, os.cpu_count() or 1))


def in_threads(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield `function(item)` in the items' order; at most `workers` + 1 are started ahead.

    Checksums, zstd, Parquet and waiting for a store release the interpreter's lock.
    """
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="shards")
    yield from _in_order(pool, function, items, workers)


def in_processes(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield `function(item)` in the items' order, from processes of their own.

    For what holds the interpreter's lock; function, items and results are pickled. The processes
    start from nothing: a fork would share this one's threads and connections.
    """
    pool = ProcessPoolExecutor(max(1, workers), mp_context=get_context("spawn"))
    yield from _in_order(pool, function, items, workers)


def _in_order(
    pool: Executor, function: Callable[[T], R], items: Iterable[T], workers: int
) -> Iterator[R]:
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
