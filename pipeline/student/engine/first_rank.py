"""Work of the first rank alone, however long it takes; the others wait as long as it lives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from pipeline.errors import DistillError

__all__ = ["on_first_rank"]

T = TypeVar("T")
_DONE, _FAILED = "done", "failed"
_AGAIN = "run the same command again; it goes on from the last complete checkpoint"


def on_first_rank(
    work: Callable[[], T], store: Any, *, is_first: bool, name: str, timeout_s: float
) -> T | None:
    """Run `work` on the first rank while the others wait; return its result, None on the others.

    A barrier would end at the timeout that is meant for dead peers. Here the first rank shows every
    few seconds that it lives, and the timeout counts from the last time.

    Args:
        work: takes seconds or hours.
        store: of the process group, which all ranks reach.
        is_first: whether this rank does it.
        name: of the work, no other's in this run.
        timeout_s: seconds without a sign of life after which the others end.

    Raises:
        DistillError: on the others: the first rank failed, or shows no sign of life.
    """
    if is_first:
        with _SignsOfLife(store, name, every_s=min(5.0, timeout_s / 4)):
            try:
                result = work()
            except BaseException:
                with suppress(RuntimeError):  # the store is gone: the others know
                    store.set(f"{name}/{_FAILED}", "1")
                raise
            store.set(f"{name}/{_DONE}", "1")
            return result
    try:
        _wait(store, name, timeout_s)
    except RuntimeError as error:  # of the store, which ends with the process that has it
        raise DistillError(
            f"rank 0 is gone ({name}: {str(error).strip().splitlines()[0][:160]})", do=_AGAIN
        ) from None
    return None


def _wait(store: Any, name: str, timeout_s: float) -> None:
    """Return when the work is done; see `on_first_rank`."""
    signs, seen = -1, time.monotonic()
    while not store.check([f"{name}/{_DONE}"]):
        if store.check([f"{name}/{_FAILED}"]):
            raise DistillError(f"rank 0 failed at its part ({name})", do="see what it says")
        now = store.add(f"{name}/signs", 0)
        if now != signs:
            signs, seen = now, time.monotonic()
        elif time.monotonic() - seen > timeout_s:
            raise DistillError(
                f"rank 0 has shown no sign of life for {timeout_s:g} s ({name})",
                do=_AGAIN,
            )
        time.sleep(min(1.0, timeout_s / 10))


class _SignsOfLife:
    """Counts up in the store, on a thread, until the work is done."""

    def __init__(self, store: Any, name: str, *, every_s: float) -> None:
        self._store, self._key, self._every_s = store, f"{name}/signs", every_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        with suppress(RuntimeError):  # the store is gone, and so are the others
            while True:
                self._store.add(self._key, 1)
                if self._end.wait(self._every_s):
                    return
