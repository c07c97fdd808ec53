"""Which piece of work a worker takes next: a free one, else a dead worker's, until all are done.

Each worker takes free pieces in an order of its own, so that many of them seldom meet. Only when
all are leased are other workers' leases looked at.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Protocol, TypeVar

from pipeline.observe.shares import Shares
from pipeline.storage import Store
from pipeline.teacher.fleet.leases import Lease, LeaseBoard
from pipeline.teacher.fleet.signals import stop_if_asked

__all__ = ["Work", "leased_work"]

_log = logging.getLogger(__name__)

_LISTING_GOOD_FOR = 100
"""A listing is good for so many times the time it took: listing costs at most 1 %."""
_DOUBTS = 2
"""Or until so many pieces in it turned out to be another worker's, which costs as much as a
listing (thousands of tiny shards, many workers)."""


class Work(Protocol):
    """One piece of work, done when its file is there."""

    @property
    def name(self) -> str:
        """What its lease is called."""
        ...

    @property
    def file_name(self) -> str:
        """The file that says that it is done, in the folder of all such files."""
        ...

    def is_done(self, store: Store) -> bool:
        """Return whether it is, by a look at its file alone."""
        ...


W = TypeVar("W", bound=Work)


def leased_work(
    works: Sequence[W],
    folder: str,
    board: LeaseBoard,
    *,
    shares: Shares,
    done: Callable[[Sequence[str]], Container[str]] = frozenset,
    before_waiting: Callable[[], bool] = lambda: False,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[W, Lease]]:
    """Yield pieces of work with their leases until all are done, whoever did them.

    The caller gives each lease back; a piece that is not done then is yielded again.

    Args:
        works: all pieces.
        folder: where the files lie that say what is done.
        board: this worker's leases.
        shares: the account of the time that leases take.
        done: the names that a listing of the folder stands for.
        before_waiting: finishes what the caller has still in its hands, when others are waited
            for; returns whether there was any.
        wait: sleeps.
    """
    store = board.store
    draw = random.Random(board.worker)
    while True:
        stop_if_asked()
        started = time.monotonic()
        with shares.spent("leases"):
            finished = done(store.list(folder))
        missing = [work for work in works if work.file_name not in finished]
        shares.level(planned_shards=len(works), recorded_shards=len(works) - len(missing))
        if not missing:
            return
        with shares.spent("leases"):
            newest = board.attempts()
        listed = time.monotonic()
        free = [work for work in missing if work.name not in newest]
        if free:
            good_until = listed + _LISTING_GOOD_FOR * (listed - started)
            doubts = 0
            while free and doubts < _DOUBTS:
                work = free.pop(draw.randrange(len(free)))
                lease = _try_lease(work, None, board, shares)
                if lease is None:
                    doubts += 1
                else:
                    yield work, lease
                if time.monotonic() > good_until:
                    break
            continue
        if before_waiting():
            continue
        for work in missing:
            lease = _try_lease(work, newest[work.name], board, shares)
            if lease is not None:
                _log.warning("taking over %s, attempt %d", work.name, lease.attempt + 1)
                yield work, lease
                break
        else:
            _log.debug("%d shards are in other workers' hands", len(missing))
            wait(min(5.0, board.lease_s / 10))


def _try_lease(work: Work, newest: int | None, board: LeaseBoard, shares: Shares) -> Lease | None:
    """Lease a piece of work that is not done, if it can be had."""
    stop_if_asked()
    with shares.spent("leases"):
        lease = board.try_lease(work.name, newest)
        # Between the listing and the lease another worker may have done it.
        if lease is not None and work.is_done(board.store):
            board.done(lease)
            return None
    return lease
