"""Apply a function to many shards in threads or processes, with a bounded number in memory."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

__all__ = ["default_workers", "in_processes", "in_threads", "usable_cores"]

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """Return the threads for reading shards: the cores, at most 8 (each holds one shard)."""
    return min(8, usable_cores())


def usable_cores(*, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many cores this process may use, at least 1.

    Not the machine's: a scheduler leaves a process some of them, by its affinity. A container sees
    all of them, and its quota counts.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


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
