"""Blocks of rows on a CPU: one OpenMP thread for each block, several blocks at a time.

OpenMP divides every operation of a block among its threads and waits for the slowest. Where cores
are shared, one of them is often not running: two took 8 to 18 ms a row where one took 2 to 3.
Here threads take whole blocks and wait for each other once, at the end.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

__all__ = ["for_each_block", "one_torch_thread"]

_MOST_HELPERS = 256


def for_each_block(starts: Iterable[int], open_worker: Callable[[], Callable[[int], None]]) -> None:
    """Work on all blocks, with as many threads as torch has for this thread.

    The calling thread is one of them, so a single block costs no thread and no waiting. Gradients
    are off. Inference mode, which torch keeps for each thread, is the caller's in all of them.

    Args:
        starts: what names the blocks.
        open_worker: called once in each thread that takes part; returns what works on one block.
            What it allocates is freed when the thread has found no more blocks.
    """
    import torch

    left = deque(starts)
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        with one_torch_thread(), torch.inference_mode(inference), torch.no_grad():
            if not left:
                return
            run = open_worker()
            try:
                for start in _taken(left):
                    run(start)
            except BaseException:
                left.clear()  # the others end with the block they are at
                raise

    threads = torch.get_num_threads()
    if threads > 1 and _libraries() is None:
        threads = 1
    helpers = min(threads, len(left), _MOST_HELPERS) - 1
    futures = [_pool().submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        # A helper that has not begun is not waited for: on a full machine that takes milliseconds.
        begun = [future for future in futures if not future.cancel()]
        wait(begun)
    for future in begun:
        future.result()


def _taken(left: deque[int]) -> Iterator[int]:
    """Yield what this thread gets of what several threads take from the left."""
    while left:
        try:
            start = left.popleft()
        except IndexError:  # another thread took the last one
            return
        yield start


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch's operations of the calling thread without other threads.

    Not by `torch.set_num_threads`: it also sets the number of every thread that uses torch for the
    first time later, and switches off MKL's choice of threads for the whole process, which can
    change the bits of the teacher's matrix products. vLLM replaces it by a function that does
    nothing. The calls of OpenMP and MKL are of the calling thread alone.
    """
    import torch

    before = torch.get_num_threads()  # torch sets it at a thread's first use, and not again
    libraries = _libraries() if before > 1 else None
    if libraries is None:
        yield
        return
    set_openmp, set_mkl = libraries
    mkl_before = set_mkl(1)
    try:
        set_openmp(1)
        yield
    finally:
        set_openmp(before)
        set_mkl(mkl_before)


@cache
def _libraries() -> tuple[Callable[[int], object], Callable[[int], int]] | None:
    """Return what sets OpenMP's and MKL's threads where torch looks; None where it is not found.

    To be called where torch has more than one thread. A preloaded library, which is the process's,
    comes before the one that torch brings. MKL, which computes the exponentials, has a number of
    its own as soon as `torch.set_num_threads` was called: 0 means that it asks OpenMP.
    """
    import torch

    before = torch.get_num_threads()
    torch_library = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    for name in (None, torch_library):
        with suppress(OSError, AttributeError):
            set_openmp = ctypes.CDLL(name).omp_set_num_threads
            set_openmp.argtypes, set_openmp.restype = [ctypes.c_int], None
            set_openmp(1)
            found = torch.get_num_threads() == 1
            set_openmp(before)
            if found:
                return set_openmp, _mkl(torch_library)
    return None


def _mkl(library: str) -> Callable[[int], int]:
    """Return MKL's function, which answers with the number before; without MKL one for it."""
    try:
        set_mkl: Callable[[int], int] = ctypes.CDLL(library).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return lambda _: 0
    return set_mkl


@cache
def _pool() -> ThreadPoolExecutor:
    """Return this process's threads, started as they are needed, idle between two calls.

    The interpreter ends them at its exit, which takes as long as a block.
    """
    return ThreadPoolExecutor(
        _MOST_HELPERS, thread_name_prefix="cpu-blocks", initializer=_use_the_cores_of_openmp
    )


def _use_the_cores_of_openmp() -> None:
    """Let the calling thread run where OpenMP's other threads may.

    vLLM's CPU workers bind each of OpenMP's threads to a core (GOMP_CPU_AFFINITY), the main thread
    too, and a new thread inherits the binding of the one that starts it: all helpers would share
    one core with it. Threads with more cores than the main thread are not OpenMP's (numpy's were
    started before the binding), and theirs may be another worker's.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    own = os.sched_getaffinity(0)
    others: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # ended meanwhile
            cores = os.sched_getaffinity(int(thread))
            if len(cores) <= len(own):
                others |= cores - own
    if others:
        with suppress(OSError):  # taken away meanwhile: stay where we are
            os.sched_setaffinity(0, others)
