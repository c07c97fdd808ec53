"""One worker of stage one: claims shards, makes them, until every shard has its record."""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.manifest import ShardRecord, record_name
from pipeline.cache.writer import intact_record
from pipeline.observe.progress import Progress
from pipeline.storage import Store
from pipeline.teacher.claims import Claim, ClaimBoard
from pipeline.teacher.engine import CaptureRequest, Engine
from pipeline.teacher.plan import PlannedShard

__all__ = ["ShardMaker", "first_shard", "make_all"]

_log = logging.getLogger(__name__)

_GOLDEN = (5**0.5 - 1) / 2

Columns = list[NDArray[np.float32]]


class ShardMaker:
    """Captures shards one after the other; encoding and writing run beside, one shard behind.

    The engine is opened at the first shard: a worker that finds nothing to do loads no teacher.
    """

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        requests: Callable[[PlannedShard], list[CaptureRequest]],
        write: Callable[[PlannedShard, Columns], ShardRecord],
        board: ClaimBoard,
        progress: Progress,
    ) -> None:
        """Keep the parts; use as a context manager."""
        self._open_engine = open_engine
        self._requests = requests
        self._write = write
        self._board = board
        self._progress = progress
        self._engine: Engine | None = None
        self._pending: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="cache-writer")

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
        self._writer.shutdown(wait=True)
        self._board.give_up_all()
        if self._engine is not None:
            self._engine.close()

    def make(self, shard: PlannedShard, claim: Claim) -> None:
        """Capture a shard and hand it to the writer."""
        if self._engine is None:
            self._engine = self._open_engine()
        started = time.monotonic()
        columns = self._engine.capture(
            self._requests(shard), on_tokens=partial(self._progress.advance, shard=shard.name)
        )
        _log.debug("shard %s captured in %.1f s", shard.name, time.monotonic() - started)
        # At most one shard waits: a slow store holds the teacher back instead of filling memory.
        self.flush()
        self._pending = self._writer.submit(self._commit, shard, claim, columns)

    def flush(self) -> None:
        """Wait until the shard in the writer's hands is committed; raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _commit(self, shard: PlannedShard, claim: Claim, columns: Columns) -> None:
        self._write(shard, columns)
        self._board.done(claim)


def make_all(
    shards: Sequence[PlannedShard],
    store: Store,
    board: ClaimBoard,
    maker: ShardMaker,
    *,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Claim and make shards until all have a record, whoever made it.

    Each worker starts at a place of its own, so that many of them do not meet at every shard.
    """
    start = first_shard(board.worker, len(shards))
    ordered = [*shards[start:], *shards[:start]]
    while True:
        recorded = set(store.list("_meta/shards"))
        missing = [shard for shard in ordered if _record_file(shard) not in recorded]
        if not missing:
            return
        newest = board.attempts()
        claimed_any = False
        for shard in missing:
            claim = board.try_claim(shard.name, newest.get(shard.name))
            if claim is None:
                continue
            claimed_any = True
            # Between the listing and the claim another worker may have committed it.
            if intact_record(store, shard.split, shard.index, check_bytes=False) is not None:
                board.done(claim)
                continue
            if claim.attempt:
                _log.warning("taking over shard %s, attempt %d", shard.name, claim.attempt + 1)
            maker.make(shard, claim)
        maker.flush()
        if not claimed_any:
            _log.debug("%d shards are in other workers' hands", len(missing))
            wait(min(5.0, board.lease_s / 10))


def first_shard(worker: str, count: int) -> int:
    """Return where in `count` shards a worker starts to look.

    Pods that know their number (`DISTILL_REPLICA_INDEX`, from a label that the operator sets) are
    spread by the golden ratio, evenly for any number of them, known or not; others by their name.
    """
    index = os.environ.get("DISTILL_REPLICA_INDEX", "")
    if index.isdigit():
        return int(count * (int(index) * _GOLDEN % 1))
    return zlib.crc32(worker.encode()) % max(count, 1)


def _record_file(shard: PlannedShard) -> str:
    return record_name(shard.split, shard.index).rsplit("/", 1)[-1]
