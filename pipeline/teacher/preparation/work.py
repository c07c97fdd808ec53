"""What one worker does for the corpus: units, taken by lease, beside whatever else it does."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pipeline.corpus.prepared.folder import PreparedFolder, fold_range
from pipeline.corpus.prepared.summary import UnitSummary
from pipeline.corpus.prepared.units import Unit
from pipeline.observe.shares import Shares
from pipeline.storage import Store
from pipeline.teacher.fleet.leases import Lease, LeaseBoard
from pipeline.teacher.fleet.queue import WorkPool, leased_work
from pipeline.teacher.fleet.signals import stop_if_asked
from pipeline.teacher.preparation.processes import Recipe, UnitProcesses, default_processes

__all__ = ["SMALL_BYTES", "Preparation", "fold_summaries", "forget_unit"]

SMALL_BYTES = 32 << 20
"""A first unit up to this size is prepared in this process, whose other threads have to share the
interpreter's lock with it."""
_SHORTEST_S, _LONGEST_S = 0.2, 4.0
_PARTING_S = 3.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UnitWork:
    """A unit, as a piece of work of the fleet."""

    unit: Unit

    @property
    def name(self) -> str:
        """What its lease is called."""
        return f"unit-{self.unit.index:05d}"

    def is_done(self, store: Store) -> bool:
        """Return whether its summary is there, alone or folded, by one listing."""
        return self.unit.index in PreparedFolder(store).done()[0]


class Preparation:
    """Prepares what is missing of a corpus, on a thread and in processes; a context manager."""

    def __init__(
        self,
        folder: PreparedFolder,
        units: tuple[Unit, ...],
        recipe: Recipe,
        board: LeaseBoard,
        *,
        shares: Shares,
        prepare: Callable[[Unit], UnitSummary],
        processes: int | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            folder: the prepared corpus.
            units: all of it.
            recipe: how they are prepared.
            board: leases on the folder's store.
            shares: the worker's account.
            prepare: prepares the first unit, in this process; its summary is not committed yet.
            processes: how many tokenise; None: as many as there are cores for.
        """
        self._folder = folder
        self._works = tuple(UnitWork(unit) for unit in units)
        self._recipe = recipe
        self._board = board
        self._shares = shares
        self._processes = processes or default_processes(len(units))
        self._more = threading.Event()
        self._running: dict[Future[bytes], Lease] = {}
        self._tokenising: UnitProcesses | None = None
        self._prepare_here = prepare
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = self._new_thread()

    def __enter__(self) -> Self:
        """Start."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, and give back what is not done."""
        self.stop()

    def stop(self) -> None:
        """Stop, and give back what is not done."""
        self._stop.set()
        for _ in range(2):  # once more for processes that the thread was about to start
            if self._tokenising is not None:
                self._tokenising.close()
            self._thread.join(_PARTING_S)
        self._board.give_up_all()

    def check(self) -> None:
        """Raise what the thread has raised.

        Raises:
            CorpusError, StoreError, ResourceError: as the parts say.
        """
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait until every unit is prepared, whoever does it.

        Raises:
            CorpusError, StoreError, ResourceError: as the parts say.
        """
        while self._thread.is_alive():
            self._thread.join(_LONGEST_S)
        self.check()

    def pause(self, seconds: float) -> None:
        """Wait for a unit of this worker, at most so long.

        Raises:
            CorpusError, StoreError, ResourceError: what stopped the preparation.
        """
        self._more.wait(seconds)
        self._more.clear()
        self.check()
        if not self._thread.is_alive():
            # All units were done, and yet more is waited for: a summary turned out to be damaged.
            self._thread = self._new_thread()
            self._thread.start()

    def wait_until(self, known: Callable[[], bool]) -> None:
        """Wait until enough is known, whoever prepares it.

        Raises:
            CorpusError, StoreError, ResourceError: what stopped the preparation.
        """
        pause = _SHORTEST_S
        while not known():
            self.pause(pause)
            pause = min(2 * pause, _LONGEST_S)

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="preparation", daemon=True)

    def _run(self) -> None:
        try:
            with self._board.beating():
                self._prepare()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._more.set()

    def _prepare(self) -> None:
        works = leased_work(
            _UnitPool(self._folder, self._works, self._board),
            self._board,
            shares=Shares(),
            in_order=True,
            ahead=1,  # the teacher waits for the first unit, then for the second, ...
            before_waiting=self._finish_some,
            wait=self._wait,
        )
        for number, (work, lease) in enumerate(works):
            if self._stop.is_set():
                raise _Stopped
            # Processes take seconds to start: the first shard need not wait for them.
            if number == 0 and work.unit.size <= SMALL_BYTES:
                summary = self._prepare_here(work.unit)
                self._folder.commit(summary)
                self._finish(summary, lease)
            else:
                if self._tokenising is None:
                    self._tokenising = UnitProcesses(self._recipe, self._processes)
                is_last = work is self._works[-1]
                self._running[self._tokenising.submit(work.unit, is_last=is_last)] = lease
                while len(self._running) > self._processes:
                    self._finish_some()
        # A process has committed its unit before this thread hears of it, and the heartbeat would
        # bring back a lease that is swept while it is held.
        while self._finish_some():
            pass
        # Every unit is done: what is left is of workers that were killed.
        self._board.sweep()
        self._folder.remove_partials(self._board.folder)

    def _finish_some(self) -> bool:
        """Wait for a unit of this worker's processes; return whether there was one."""
        if not self._running:
            return False
        done, _ = wait_for(self._running, return_when=FIRST_COMPLETED)
        for future in done:
            lease = self._running.pop(future)
            if self._stop.is_set():
                raise _Stopped
            self._finish(UnitProcesses.result(future), lease)
        return True

    def _finish(self, summary: UnitSummary, lease: Lease) -> None:
        """Give a committed unit's lease back, and account for it."""
        self._board.done(lease)
        self._shares.add(units=1, tokenised=sum(block.num_tokens for block in summary.blocks))
        self._more.set()

    def _wait(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Stopped


class _UnitPool(WorkPool[UnitWork]):
    """All units; known from the beginning."""

    def __init__(
        self, folder: PreparedFolder, works: tuple[UnitWork, ...], board: LeaseBoard
    ) -> None:
        self._folder = folder
        self._works = works
        self._board = board

    def missing(self, *, look: bool = True) -> list[UnitWork]:
        done, names = self._folder.done()
        fold_summaries(self._folder, names, len(self._works), self._board)
        return [work for work in self._works if work.unit.index not in done]

    @property
    def total(self) -> int:
        return len(self._works)

    @property
    def is_complete(self) -> bool:
        return True


def fold_summaries(
    folder: PreparedFolder, names: Sequence[str], num_units: int, board: LeaseBoard
) -> None:
    """Join the summaries of full ranges, of which this worker gets the lease.

    Args:
        folder: the prepared corpus.
        names: a listing of its summaries.
        num_units: all, or those that are known.
        board: leases.
    """
    firsts = list(folder.to_fold(set(names), num_units))
    newest = board.attempts() if firsts else {}
    for first in firsts:
        name = _fold_name(first)
        lease = board.try_lease(name, newest.get(name))
        if lease is not None:
            folder.fold(first)
            board.done(lease)


def forget_unit(folder: PreparedFolder, index: int, board: LeaseBoard) -> None:
    """Say that a unit is not done, while nobody else folds or forgets units of its range.

    Args:
        folder: the prepared corpus.
        index: of the unit.
        board: leases.
    """
    name = _fold_name(index)
    while (lease := board.try_lease(name, board.attempts().get(name))) is None:
        stop_if_asked()
        time.sleep(min(_LONGEST_S, board.lease_s / 10))
    folder.forget(index)
    board.done(lease)


def _fold_name(index: int) -> str:
    """Return what the lease on the joined summaries of a unit's range is called."""
    units = fold_range(index)
    return f"fold-{units[0]:05d}-{units[-1]:05d}"


class _Stopped(Exception):
    """The worker goes."""
