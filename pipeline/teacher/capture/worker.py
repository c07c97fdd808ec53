"""One worker of stage one: what it does with a shard, one after the other, until all are there."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from pipeline.amounts import format_bytes
from pipeline.cache.io.writer import commit_shard
from pipeline.errors import StoreError
from pipeline.observe.shares import Shares
from pipeline.progress import Progress
from pipeline.teacher.capture.agreement import QuarantineLists
from pipeline.teacher.capture.encode import encode_columns
from pipeline.teacher.capture.environment import agree_on_environment, describe_environment
from pipeline.teacher.capture.plan import PlannedShard, complete_plan
from pipeline.teacher.capture.pool import ShardPool
from pipeline.teacher.capture.source import shard_counts
from pipeline.teacher.capture.task import CaptureTask
from pipeline.teacher.capture.witnesses import Witnesses
from pipeline.teacher.engines.base import Engine
from pipeline.teacher.fleet.background import Behind
from pipeline.teacher.fleet.inflight import InFlightMarker
from pipeline.teacher.fleet.leases import Lease, LeaseBoard
from pipeline.teacher.fleet.pulse import Pulse, WatchedEngine
from pipeline.teacher.fleet.quarantine import Answered, EngineLost, GuardedEngine
from pipeline.teacher.fleet.queue import leased_work

__all__ = ["CaptureWorker"]

_log = logging.getLogger(__name__)

_PARTING_S = 5.0
"""For the shard in the writer's hands when the run has to stop: worth a wait, not the grace."""
_ROOM = 2.0
"""Room asked for before a shard is captured, in shards: this one, and the one being written."""


class CaptureWorker:
    """Captures shards one after the other; encoding and writing run beside, one shard behind.

    The engine is opened at the first shard: a worker that finds nothing to do loads no teacher.
    """

    def __init__(
        self,
        task: CaptureTask,
        board: LeaseBoard,
        progress: Progress,
        shares: Shares,
        *,
        wait_for_more: Callable[[float], None] = time.sleep,
        pulse: Pulse | None = None,
    ) -> None:
        """Keep the parts; use as a context manager.

        Args:
            task: what is captured.
            board: this worker's leases.
            progress: advances by tokens.
            shares: the worker's account of time and counts.
            wait_for_more: waits for shards to become known, at most so many seconds.
            pulse: notices a teacher that is stuck.
        """
        self._task = task
        self._pulse = pulse or Pulse()
        self._board = board
        self._store = board.store
        self._progress = progress
        self._shares = shares
        self._wait_for_more = wait_for_more
        self._bytes_per_token = 0.0
        """A shard's size on the store by its tokens, where known, else 0."""
        self._tries = task.settings.tries
        self._lists = QuarantineLists(
            board.store,
            planned_rows=lambda: task.source.projected().samples,
            max_fraction=task.settings.max_quarantined_fraction,
        )
        self._witnesses = Witnesses(board.store, task.source)
        self._engine: Engine | None = None
        self._guarded: GuardedEngine | None = None
        self._writer = Behind("cache-writer")

    def __enter__(self) -> Self:
        """Return the worker."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the writer, give back what is not committed, free the engine."""
        if error is not None:
            # The first error is the one to show. A store that hangs gets no more than a moment.
            with contextlib.suppress(Exception):
                self._writer.wait(_PARTING_S)
        self._board.give_up_all(badly=isinstance(error, EngineLost))
        if self._engine is not None:
            self._engine.close()

    def run(self, *, wait: Callable[[float], None] = time.sleep) -> None:
        """Lease and capture shards until all have a record, whoever wrote it.

        Raises:
            ModelError: the engine answers for no row, or too many rows of the plan fail.
            StoreError: the disk has no room for a shard, or writing one failed.
        """
        task = self._task
        pool = ShardPool(
            task.source, self._board, self._progress, self._shares,
            on_complete=lambda: complete_plan(
                self._store, task.identity, shard_counts(task.source)
            ),
        )  # fmt: skip
        works = leased_work(
            pool,
            self._board,
            shares=self._shares,
            # So that the records of a segment are complete, and folded, before the next one's.
            in_order=True,
            before_waiting=self.flush,
            wait=wait,
            wait_for_more=self._wait_preparing,
        )
        for shard, lease in works:
            self._bytes_per_token = max(self._bytes_per_token, pool.bytes_per_token)
            self.make(shard, lease)
        self.flush()

    def make(self, shard: PlannedShard, lease: Lease) -> None:
        """Capture a shard whose lease is held, and hand it to the writer, which gives that back."""
        self._check_room(shard)
        answered = self._capture(shard, lease)
        # At most one shard waits: a slow store holds the teacher back instead of filling memory.
        self.flush()
        self._writer.start(partial(self._write, shard, lease, answered))

    def _wait_preparing(self, seconds: float) -> None:
        with self._shares.spent("preparing"):
            self._wait_for_more(seconds)

    def flush(self) -> bool:
        """Wait until the shard in the writer's hands is committed; return whether there was one.

        Raises:
            Exception: what the writer raised.
        """
        busy = self._writer.busy
        with self._shares.spent("waiting"):
            self._writer.wait()
        return busy

    def _capture(self, shard: PlannedShard, lease: Lease) -> Answered:
        """Return the engine's columns of a shard's rows, but for those that are quarantined.

        The list of these is on the store then.
        """
        engine = self._open_engine()
        self._witnesses.current = shard
        requests = shard.requests()
        if lease.attempt:
            engine.greet(self._witnesses.harmless_rows())
        with self._shares.spent("teacher"):
            marker = self._marker(shard, lease)
            known = self._lists.read(shard.name)
            while True:
                answered = engine.capture(
                    requests, known=known, marker=marker, on_tokens=partial(self._count, shard)
                )
                if self._lists.settle(shard.name, known, answered):
                    return answered
                known = self._lists.read_other(shard.name, answered)

    def _write(self, shard: PlannedShard, lease: Lease, answered: Answered) -> None:
        """Encode and commit a shard, and give its lease back; runs beside the engine."""
        if shard.is_done(self._store):
            # Overtaken: the shard is there, and to write over it could only harm it.
            self._board.done(lease)
            return
        if self._lists.contradicts(shard.name, answered):
            # Overtaken while paused, by a worker for which other rows failed: its word counts.
            _log.warning("shard %s: another worker quarantined other rows", shard.name)
            self._board.give_up(lease)
            return
        with self._shares.spent("encoding"):
            record, data = encode_columns(
                self._task, shard, answered.columns, answered.quarantined_ids
            )
        with self._shares.spent("store"):
            commit_shard(self._store, record, data)
        if record.tokens:
            self._bytes_per_token = max(self._bytes_per_token, record.bytes / record.tokens)
        self._shares.add(shards=1, loss_tokens=record.loss_tokens, bytes=record.bytes)
        self._board.done(lease)

    def _open_engine(self) -> GuardedEngine:
        """Return the engine, guarded; loaded once."""
        if self._guarded is None:
            with self._shares.spent("loading"), self._pulse.expecting(loading=True):
                self._engine = WatchedEngine(self._task.open_engine(), self._pulse)
            agree_on_environment(
                self._store, describe_environment(self._task.teacher, self._engine)
            )
            self._guarded = GuardedEngine(
                self._engine, tries=self._tries, witnesses=self._witnesses.any_rows
            )
        return self._guarded

    def _marker(self, shard: PlannedShard, lease: Lease) -> InFlightMarker | None:
        """Return the in-flight marker of a shard that has taken processes or engines with it."""
        if lease.attempt < self._tries or self._board.bad_ends(lease) < self._tries:
            return None
        _log.warning(
            "shard %s: %d attempts ended badly; row after row now", shard.name, lease.attempt
        )
        return InFlightMarker(self._store, shard.name)

    def _count(self, shard: PlannedShard, tokens: int) -> None:
        self._shares.add(tokens=tokens)
        self._progress.advance(tokens, shard=shard.name)

    def _check_room(self, shard: PlannedShard) -> None:
        """Say that the disk is about to be full while it is not, and before the teacher's work."""
        free = self._store.free_bytes()
        need = _ROOM * self._bytes_per_token * shard.num_tokens
        if free is None or free >= need:
            return
        self.flush()
        raise StoreError(
            f"{self._store.url}: the disk is almost full (shard {shard.name} needs about "
            f"{format_bytes(need)} of room, {format_bytes(free)} are free)",
            do="free some space and run the same command again; it goes on where it stopped",
        )
