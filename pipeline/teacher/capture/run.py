"""The capture from beginning to end: what is missing, by all workers; the manifest, by one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass

from pipeline.cache.io.finalize import ShardsMissing, finalize
from pipeline.cache.layout.manifest import Manifest, read_manifest
from pipeline.cache.layout.names import MANIFEST, shard_label
from pipeline.cache.layout.quarantine import QuarantinedRow, read_quarantine
from pipeline.cache.layout.records import ShardRecord
from pipeline.errors import CacheError
from pipeline.models.tokenizer import tokenizer_files
from pipeline.observe.shares import Shares
from pipeline.progress import Progress
from pipeline.storage import Store
from pipeline.teacher.capture.complete import LEFTOVER_FOLDERS, clear_leftovers
from pipeline.teacher.capture.plan import settle_plan
from pipeline.teacher.capture.source import shard_counts
from pipeline.teacher.capture.task import CaptureTask
from pipeline.teacher.capture.worker import CaptureWorker
from pipeline.teacher.fleet.leases import Lease, LeaseBoard
from pipeline.teacher.fleet.processes import worker_name
from pipeline.teacher.fleet.pulse import Pulse
from pipeline.teacher.fleet.queue import leased_work
from pipeline.teacher.sparsify.stopwatch import SPARSIFIER

__all__ = ["fill_cache"]

_log = logging.getLogger(__name__)

_ROUNDS = 3


def fill_cache(
    task: CaptureTask,
    *,
    store: Store,
    command: str,
    resolved_config: str,
    progress_every_s: float,
    shares: Shares | None = None,
    wait_for_more: Callable[[float], None] = time.sleep,
    more_counts: Mapping[str, int] | None = None,
    pulse: Pulse | None = None,
) -> Manifest:
    """Capture what is missing of the cache and return its manifest.

    Rows that the teacher cannot answer are quarantined (`cache/layout/quarantine.py`); the cache is
    complete without them. Every worker captures; one of them writes the manifest, the others wait.

    Args:
        task: what is captured; its shards may still become known.
        store: the cache's root.
        command: the command line, for the card.
        resolved_config: the whole configuration, kept beside the cache.
        progress_every_s: seconds between lines of progress.
        shares: the worker's account.
        wait_for_more: waits for shards to become known, at most so many seconds.
        more_counts: what the manifest says besides the counts of the corpus.
        pulse: notices a teacher that is stuck.

    Raises:
        CacheError: the store holds another identity's cache.
        ModelError: the teacher answers for no row, or for too few.
    """
    shares = shares or Shares()
    shares.inside("teacher", "sparsifier", SPARSIFIER.seconds)
    settle_plan(store, task.identity)
    pulse = pulse or Pulse()
    board = LeaseBoard(store, worker_name(), task.settings.lease_s, is_alive=lambda: pulse.is_alive)
    progress = Progress(
        task.source.projected().tokens,
        unit="tokens",
        description="cache-teacher",
        every_s=progress_every_s,
    )
    finisher = _Finisher(task, store, command, resolved_config, more_counts or {})
    with progress, board.beating():
        # A worker that was overtaken may write a recorded shard once more at this moment, and a
        # store may cut that write short: the shard is then captured again, like any damaged one.
        for rounds_left in reversed(range(_ROUNDS)):
            with CaptureWorker(
                task, board, progress, shares, wait_for_more=wait_for_more, pulse=pulse
            ) as worker:
                worker.run()
            try:
                return _finish(finisher, board)
            except ShardsMissing:
                if not rounds_left:
                    raise
    raise AssertionError  # the last round returns or raises


def _finish(finisher: _Finisher, board: LeaseBoard) -> Manifest:
    """Write the manifest, or wait for the worker that does."""
    for _, lease in leased_work(finisher, board, shares=Shares()):
        try:
            finisher.finish(board, lease)
        except CacheError:
            board.give_up(lease)
            raise
        board.done(lease)
    clear_leftovers(board.store)  # of one that was killed after the manifest
    return read_manifest(board.store)


@dataclass(slots=True)
class _Finisher:
    """The last piece of work: the manifest. It is itself the pool of that one piece."""

    task: CaptureTask
    store: Store
    command: str
    resolved_config: str
    more_counts: Mapping[str, int]

    @property
    def name(self) -> str:
        """What its lease is called."""
        return "manifest"

    @property
    def total(self) -> int:
        """The shards: they are all there."""
        return len(self.task.source.shards)

    @property
    def is_complete(self) -> bool:
        """No further pieces come."""
        return True

    def is_done(self, store: Store) -> bool:
        """Return whether there is a manifest."""
        return store.exists(MANIFEST)

    def missing(self, *, look: bool = True) -> list[_Finisher]:
        """Return itself while there is none."""
        return [] if self.is_done(self.store) else [self]

    def finish(self, board: LeaseBoard, lease: Lease) -> None:
        """Remove what killed workers left; write the files of the whole cache, the manifest last.

        Raises:
            ShardsMissing: shards lack a file of the recorded size; they are unrecorded now.
            CacheError: rows of the corpus are in no shard.
        """
        task, store = self.task, self.store
        board.sweep(keep=lease)
        leftovers = store.remove_partials(LEFTOVER_FOLDERS)
        if leftovers:
            _log.info("%d unfinished files of killed workers removed", leftovers)
        store.write("_meta/config.yaml", self.resolved_config.encode())
        files = tokenizer_files(task.teacher.tokenizer)
        for name, data in files.items():
            store.write(f"_meta/tokenizer/{name}", data)
        quarantined = read_quarantine(store)
        counts: dict[str, int] = asdict(task.source.counts()) | dict(self.more_counts)
        planned = shard_counts(task.source)
        finalize(
            store,
            planned,
            identity=task.identity,
            spec=task.spec,
            temperatures=task.scheme.temperatures,
            corpus_counts=counts,
            corpus_content=task.source.content,
            tokenizer_files=sorted(files),
            command=self.command,
            rows_quarantined=sum(map(len, quarantined.values())),
            accept=_acceptance(task, quarantined),
        )


def _acceptance(
    task: CaptureTask, quarantined: Mapping[str, Collection[QuarantinedRow]]
) -> Callable[[ShardRecord], bool]:
    """Return whether a record is of the planned shard, without the rows that its list names."""
    sources = {shard.key: shard.source.source_xxh3_128 for shard in task.source.shards}

    def accept(record: ShardRecord) -> bool:
        lacking = len(quarantined.get(shard_label(*record.key), ()))
        same = record.source_xxh3_128 == sources.get(record.key)
        return same and record.rows_quarantined == lacking

    return accept
