"""Which piece of work a worker takes next: a free one, else a dead worker's, until all are done.

Each worker takes free pieces in an order of its own, so that many of them seldom meet. Only when
all are leased are other workers' leases looked at.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from pipeline.observe.shares import Shares
from pipeline.storage import Store
from pipeline.teacher.fleet.leases import Lease, LeaseBoard
from pipeline.teacher.fleet.signals import stop_if_asked

__all__ = ["Work", "WorkPool", "leased_work"]

_log = logging.getLogger(__name__)

_LISTING_GOOD_FOR = 100
"""A listing is good for so many times the time it took: listing costs at most 1 %."""
_DOUBTS = 2
"""Or until so many pieces in it turned out to be another worker's, which costs as much as a
listing (thousands of tiny shards, many workers)."""
_AHEAD = 64
"""Free pieces to choose from beside twice as many as others hold, where their order matters: two
workers seldom meet, and what comes first is done first."""
_ENOUGH = 32
"""Free pieces beside twice as many as others hold, with which no further ones are looked for."""
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.05, 2.0


class Work(Protocol):
    """One piece of work, done when the store says so."""

    @property
    def name(self) -> str:
        """What its lease is called."""
        ...

    def is_done(self, store: Store) -> bool:
        """Return whether it is, by one listing or look."""
        ...


W = TypeVar("W", bound=Work)


class WorkPool(Protocol[W]):
    """The pieces of work that are known, and which of them are done."""

    def missing(self, *, look: bool = True) -> list[W]:
        """Look at the store, and return the known pieces that are not done, in their order.

        Args:
            look: look for further pieces first; False while enough of the known ones are free.
        """
        ...

    @property
    def total(self) -> int:
        """How many pieces are known."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether no further pieces come."""
        ...


def leased_work(
    pool: WorkPool[W],
    board: LeaseBoard,
    *,
    shares: Shares,
    in_order: bool = False,
    ahead: int = _AHEAD,
    before_waiting: Callable[[], bool] = lambda: False,
    wait: Callable[[float], None] = time.sleep,
    wait_for_more: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[W, Lease]]:
    """Yield pieces of work with their leases until all are done, whoever did them.

    The caller gives each lease back; a piece that is not done then is yielded again.

    Args:
        pool: all pieces.
        board: this worker's leases.
        shares: the account of the time that leases take.
        in_order: take one of the first free pieces, of about as many as are being worked on; else
            any.
        ahead: free pieces to choose from, in order, beside twice as many as others hold.
        before_waiting: finishes what the caller has still in its hands, when others are waited
            for; returns whether there was any.
        wait: sleeps while others work on all that is left.
        wait_for_more: sleeps while no further piece is known.
    """
    draw = random.Random(board.worker)
    pause = _SHORTEST_WAIT_S
    # Each look for more costs each worker requests: 125,000 units times 512 workers are too many.
    look = True
    while True:
        stop_if_asked()
        started = time.monotonic()
        with shares.spent("leases"):
            missing = pool.missing(look=look)
        shares.level(planned_shards=pool.total, recorded_shards=pool.total - len(missing))
        if not missing:
            if pool.is_complete:
                return
            if not look:
                look = True
                continue
            if not before_waiting():
                wait_for_more(pause)
                pause = min(2 * pause, _LONGEST_WAIT_S)
            continue
        pause = _SHORTEST_WAIT_S
        with shares.spent("leases"):
            newest = board.attempts()
        listed = time.monotonic()
        free = [work for work in missing if work.name not in newest]
        look = len(free) < 2 * (len(missing) - len(free)) + _ENOUGH
        if free:
            good_until = listed + _LISTING_GOOD_FOR * (listed - started)
            doubts = 0
            window = 2 * (len(missing) - len(free)) + ahead if in_order else len(free)
            while free and doubts < _DOUBTS:
                work = free.pop(draw.randrange(min(len(free), window)))
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
            _log.debug("%d pieces are in other workers' hands", len(missing))
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
