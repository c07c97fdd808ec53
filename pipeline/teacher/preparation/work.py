"""What one worker does for the corpus: units, taken by lease, beside whatever else it does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pipeline.corpus.intake import Intake
from pipeline.corpus.prepared.folder import FOLD, PreparedFolder
from pipeline.corpus.prepared.summary import UnitSummary
from pipeline.corpus.prepared.units import Unit
from pipeline.errors import DistillError
from pipeline.observe.shares import Shares
from pipeline.storage import Store
from pipeline.teacher.fleet.leases import Lease, LeaseBoard
from pipeline.teacher.fleet.queue import WorkPool, leased_work
from pipeline.teacher.preparation.processes import (
    Recipe,
    UnitProcesses,
    default_processes,
    prepare_here,
)

__all__ = ["SMALL_BYTES", "Preparation"]

SMALL_BYTES = 32 << 20
"""A first unit up to this size is prepared in this process, whose other threads have to share the
interpreter's lock with it."""
_SHORTEST_S, _LONGEST_S = 0.05, 2.0
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
        intake: Intake,
        processes: int | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            folder: the prepared corpus.
            units: all of it.
            recipe: how they are prepared.
            board: leases on the folder's store.
            shares: the worker's account.
            intake: this process's reader of units, for the first of them.
            processes: how many tokenise; None: as many as there are cores for.
        """
        self._folder = folder
        self._works = tuple(UnitWork(unit) for unit in units)
        self._recipe = recipe
        self._board = board
        self._shares = shares
        self._processes = processes or default_processes(len(units))
        self._more = threading.Event()
        self._running: dict[Future[bytes | DistillError], tuple[UnitWork, Lease]] = {}
        self._pool: UnitProcesses | None = None
        self._intake = intake
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="preparation", daemon=True)

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
        if self._pool is not None:
            self._pool.close()
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
            self._thread.join(0.5)
        self.check()

    def pause(self, seconds: float) -> None:
        """Wait for a unit of this worker, at most so long.

        Raises:
            CorpusError, StoreError, ResourceError: what stopped the preparation.
        """
        self._more.wait(seconds)
        self._more.clear()
        self.check()

    def wait_until(self, known: Callable[[], bool]) -> None:
        """Wait until enough is known, whoever prepares it.

        Raises:
            CorpusError, StoreError, ResourceError: what stopped the preparation.
        """
        pause = _SHORTEST_S
        while not known():
            self.pause(pause)
            pause = min(2 * pause, _LONGEST_S)

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
        pool = _UnitPool(self._folder, self._works, self._board)
        works = leased_work(
            pool, self._board, shares=Shares(), in_order=True,
            before_waiting=self._finish_some, wait=self._pause,
        )  # fmt: skip
        for number, (work, lease) in enumerate(works):
            if self._stop.is_set():
                raise _Stopped
            # Processes take seconds to start: the first shard need not wait for them.
            if number == 0 and work.unit.size <= SMALL_BYTES:
                summary = prepare_here(
                    self._intake, self._folder, work.unit, is_last=work is self._works[-1]
                )
                self._commit(summary, lease)
            else:
                self._pool = self._pool or UnitProcesses(self._recipe, self._processes)
                self._running[self._pool.submit(work.unit, is_last=work is self._works[-1])] = (
                    work,
                    lease,
                )
                while len(self._running) > self._processes:
                    self._finish_some()

    def _finish_some(self) -> bool:
        """Wait for a unit of this worker's processes; return whether there was one."""
        if not self._running:
            return False
        done, _ = wait_for(self._running, return_when=FIRST_COMPLETED)
        for future in done:
            _, lease = self._running.pop(future)
            if self._stop.is_set():
                raise _Stopped
            self._commit(UnitProcesses.result(future), lease)
        return True

    def _commit(self, summary: UnitSummary, lease: Lease) -> None:
        self._folder.commit(summary)
        self._board.done(lease)
        tokens = sum(
            block.train.tokens + sum(row.tokens for row in block.candidates)
            for block in summary.blocks
        )
        self._shares.add(units=1, tokenised=tokens)
        self._more.set()

    def _pause(self, seconds: float) -> None:
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

    def missing(self) -> list[UnitWork]:
        done, names = self._folder.done()
        self._fold(set(names))
        return [work for work in self._works if work.unit.index not in done]

    def _fold(self, names: set[str]) -> None:
        """Join the summaries of full ranges."""
        for first in self._folder.to_fold(names, len(self._works)):
            lease = self._board.try_lease(f"fold-{first:05d}-{first + FOLD - 1:05d}", None)
            if lease is not None:
                self._folder.fold(first)
                self._board.done(lease)

    @property
    def total(self) -> int:
        return len(self._works)

    @property
    def is_complete(self) -> bool:
        return True


class _Stopped(Exception):
    """The worker goes."""
