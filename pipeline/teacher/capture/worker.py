"""One worker of stage one: claims shards, makes them, until every shard has its record."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.io.writer import intact_record
from pipeline.cache.layout.manifest import ShardRecord, record_name
from pipeline.cache.layout.quarantine import (
    QuarantinedRow,
    quarantine_name,
    quarantine_rows,
    read_quarantine,
    read_quarantined_rows,
)
from pipeline.errors import ModelError, StoreError
from pipeline.observe.progress import Progress
from pipeline.observe.shares import Shares
from pipeline.teacher.capture.plan import PlannedShard
from pipeline.teacher.engines.base import CaptureRequest, Engine
from pipeline.teacher.fleet.background import Behind
from pipeline.teacher.fleet.inflight import Breadcrumb
from pipeline.teacher.fleet.leases import Claim, ClaimBoard
from pipeline.teacher.fleet.quarantine import Answered, EngineLost, GuardedEngine
from pipeline.teacher.fleet.signals import stop_if_asked

__all__ = ["ShardMaker", "make_all"]

_log = logging.getLogger(__name__)

Columns = list[NDArray[np.float32]]

_LISTING_GOOD_FOR = 100
"""A listing is good for so many times the time it took: listing costs at most 1 %."""
_DOUBTS = 2
"""Or until so many shards in it turned out to be another worker's, which costs as much as a
listing (thousands of tiny shards, many workers)."""
_PARTING_S = 5.0
"""For the shard in the writer's hands when the run has to stop: worth a wait, not the grace."""
_ROOM = 2.0
"""Room asked for before a shard is made, in shards: this one, and the one being written."""


class ShardMaker:
    """Captures shards one after the other; encoding and writing run beside, one shard behind.

    The engine is opened at the first shard: a worker that finds nothing to do loads no teacher.
    """

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        requests: Callable[[PlannedShard], list[CaptureRequest]],
        write: Callable[[PlannedShard, Columns, frozenset[str]], ShardRecord],
        board: ClaimBoard,
        progress: Progress,
        *,
        shards: Sequence[PlannedShard],
        tries: int,
        most_failed: int,
        bytes_per_token: float,
        shares: Shares | None = None,
    ) -> None:
        """Keep the parts; use as a context manager.

        Args:
            open_engine: loads the teacher.
            requests: what to ask the engine for a shard.
            write: encodes and commits a shard without the rows of these sample ids.
            board: this worker's claims.
            progress: told of tokens.
            shards: the whole plan.
            tries: how often a row may fail before it is quarantined.
            most_failed: rows of the plan that may be quarantined in all.
            bytes_per_token: a shard's size on the store by its tokens, where known, else 0.
            shares: the worker's account of time and counts.
        """
        self._open_engine = open_engine
        self._requests = requests
        self._write = write
        self._board = board
        self._store = board.store
        self._progress = progress
        self._shards = shards
        self._tries = tries
        self._most_failed = most_failed
        self._bytes_per_token = bytes_per_token
        self.shares = shares or Shares()
        self._engine: Engine | None = None
        self._guarded: GuardedEngine | None = None
        self._current: PlannedShard | None = None
        self._writer = Behind("cache-writer")

    def __enter__(self) -> Self:
        """Return the maker."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the writer, let go of what is not committed, free the engine."""
        if error is not None:
            # The first error is the one to show. A store that hangs gets no more than a moment.
            with contextlib.suppress(Exception):
                self._writer.wait(_PARTING_S)
        self._board.give_up_all(badly=isinstance(error, EngineLost))
        if self._engine is not None:
            self._engine.close()

    def make(self, shard: PlannedShard, claim: Claim) -> None:
        """Capture a shard and hand it to the writer.

        Raises:
            ModelError: the engine answers for no row, or too many rows of the plan fail.
            StoreError: the disk has no room for the shard, or writing the one before failed.
        """
        self._check_room(shard)
        if self._guarded is None:
            with self.shares.spent("loading"):
                self._engine = self._open_engine()
            self._guarded = GuardedEngine(
                self._engine, tries=self._tries, elsewhere=self._elsewhere
            )
        self._current = shard
        if claim.attempt:
            self._guarded.greet(self._short_rows(made=True))
        started = time.monotonic()
        with self.shares.spent("teacher"):
            answered = self._capture(self._guarded, shard, claim)
        _log.debug("shard %s captured in %.1f s", shard.name, time.monotonic() - started)
        # At most one shard waits: a slow store holds the teacher back instead of filling memory.
        self.flush()
        self._writer.start(partial(self._commit, shard, claim, answered))

    def flush(self) -> None:
        """Wait until the shard in the writer's hands is committed; raises what it raised."""
        with self.shares.spent("waiting"):
            self._writer.wait()

    def _capture(self, engine: GuardedEngine, shard: PlannedShard, claim: Claim) -> Answered:
        """Capture the rows that can be answered; the list of the others is on the store then."""
        crumb = None
        if claim.attempt >= self._tries and self._board.bad_ends(claim) >= self._tries:
            _log.warning(
                "shard %s: %d attempts ended badly; row after row now", shard.name, claim.attempt
            )
            crumb = Breadcrumb(self._store, shard.name)
        known = read_quarantined_rows(self._store, shard.name)
        while True:
            answered = engine.capture(
                self._requests(shard),
                known=known,
                crumb=crumb,
                on_tokens=partial(self._advance, shard),
            )
            if _ids(answered.failed) == _ids(known):
                return answered
            self._check_share(shard, answered.failed)
            if quarantine_rows(self._store, shard.name, answered.failed):
                return answered
            # Another worker's list, or that of one that died before its record.
            known = read_quarantined_rows(self._store, shard.name)
            if _ids(known) < _ids(answered.failed):
                self._store.delete(quarantine_name(shard.name))
                known = ()

    def _advance(self, shard: PlannedShard, tokens: int) -> None:
        self.shares.add(tokens=tokens)
        self._progress.advance(tokens, shard=shard.name)

    def _check_share(self, shard: PlannedShard, failed: Sequence[QuarantinedRow]) -> None:
        others = read_quarantine(self._store)
        others.pop(shard.name, None)
        count = len(failed) + sum(map(len, others.values()))
        if count > self._most_failed:
            planned = sum(len(shard.samples) for shard in self._shards)
            raise ModelError(
                f"{count} of {planned} rows fail, the last of them sample {failed[-1].sample_id} "
                f"of {shard.name}: {failed[-1].error}",
                expected=f"at most {self._most_failed} (capture.max_failed_fraction)",
                do="mend the teacher or the engine, or allow more; finished shards are kept",
            )

    def _elsewhere(self) -> list[CaptureRequest]:
        """Return rows of other shards, of those that are made if there are any."""
        return self._short_rows(made=True) or self._short_rows(made=False)

    def _short_rows(self, *, made: bool) -> list[CaptureRequest]:
        """Return the shortest rows of a few shards; those of made shards have harmed nobody."""
        recorded = set(self._store.list("_meta/shards"))
        shards = [
            shard
            for shard in self._shards
            if shard is not self._current and (_record_file(shard) in recorded) == made
        ]
        rows = [request for shard in shards[:3] for request in self._requests(shard)]
        return sorted(rows, key=lambda request: request.input_ids_L.size)[:3]

    def _check_room(self, shard: PlannedShard) -> None:
        """Say that the disk is about to be full while it is not, and before the teacher's work."""
        free = self._store.free_bytes()
        need = _ROOM * self._bytes_per_token * shard.num_tokens
        if free is None or free >= need:
            return
        self.flush()
        raise StoreError(
            f"{self._store.url}: the disk is almost full (shard {shard.name} needs about "
            f"{need / 1e6:.1f} MB of room, {free / 1e6:.1f} MB are free)",
            do="free some space and run the same command again; it goes on where it stopped",
        )

    def _commit(self, shard: PlannedShard, claim: Claim, answered: Answered) -> None:
        if intact_record(self._store, shard.split, shard.index, check_bytes=False) is not None:
            # Overtaken: the shard is there, and to write over it could only harm it.
            self._board.done(claim)
            return
        ids = _ids(answered.failed)
        if _ids(read_quarantined_rows(self._store, shard.name)) != ids:
            # Overtaken while paused, by a worker for which other rows failed: its word stands.
            _log.warning("shard %s: another worker set other rows aside", shard.name)
            self._board.give_up(claim)
            return
        record = self._write(shard, answered.columns, ids)
        if record.tokens:
            self._bytes_per_token = max(self._bytes_per_token, record.bytes / record.tokens)
        self.shares.add(shards=1, loss_tokens=record.loss_tokens, bytes=record.bytes)
        self._board.done(claim)


def make_all(
    shards: Sequence[PlannedShard],
    board: ClaimBoard,
    maker: ShardMaker,
    *,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Claim and make shards until all have a record, whoever made it.

    Unclaimed shards come first, each worker in an order of its own, so that many of them seldom
    meet. Only when all are claimed are other workers' claims looked at.
    """
    store = board.store
    draw = random.Random(board.worker)
    files = [(_record_file(shard), shard) for shard in shards]
    while True:
        stop_if_asked()
        started = time.monotonic()
        with maker.shares.spent("claims"):
            recorded = set(store.list("_meta/shards"))
        missing = [shard for file, shard in files if file not in recorded]
        maker.shares.level(planned_shards=len(files), recorded_shards=len(files) - len(missing))
        if not missing:
            maker.flush()
            return
        with maker.shares.spent("claims"):
            newest = board.attempts()
        listed = time.monotonic()
        unclaimed = [shard for shard in missing if shard.name not in newest]
        if unclaimed:
            good_until = listed + _LISTING_GOOD_FOR * (listed - started)
            doubts = 0
            while unclaimed and doubts < _DOUBTS:
                shard = unclaimed.pop(draw.randrange(len(unclaimed)))
                doubts += not _try_to_make(shard, None, board, maker)
                if time.monotonic() > good_until:
                    break
            continue
        maker.flush()
        if not any(_try_to_make(shard, newest[shard.name], board, maker) for shard in missing):
            _log.debug("%d shards are in other workers' hands", len(missing))
            wait(min(5.0, board.lease_s / 10))


def _try_to_make(
    shard: PlannedShard, newest: int | None, board: ClaimBoard, maker: ShardMaker
) -> bool:
    """Make the shard if it can be claimed; return whether it was made here."""
    stop_if_asked()
    with maker.shares.spent("claims"):
        claim = board.try_claim(shard.name, newest)
        if claim is None:
            return False
        # Between the listing and the claim another worker may have committed it.
        if intact_record(board.store, shard.split, shard.index, check_bytes=False) is not None:
            board.done(claim)
            return False
    if claim.attempt:
        _log.warning("taking over shard %s, attempt %d", shard.name, claim.attempt + 1)
    maker.make(shard, claim)
    return True


def _record_file(shard: PlannedShard) -> str:
    return record_name(shard.split, shard.index).rsplit("/", 1)[-1]


def _ids(rows: Sequence[QuarantinedRow]) -> frozenset[str]:
    return frozenset(row.sample_id for row in rows)
