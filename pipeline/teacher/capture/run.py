"""The capture from beginning to end: what is there, what is missing, the manifest of all."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import asdict

from pipeline.cache.io.writer import finalize
from pipeline.cache.layout.manifest import MANIFEST, SPLITS, Manifest
from pipeline.cache.layout.quarantine import QUARANTINE, clear_quarantine, read_quarantine
from pipeline.errors import CacheError
from pipeline.models.tokenizer import tokenizer_files
from pipeline.observe.shares import Shares
from pipeline.progress import Progress
from pipeline.storage import Store
from pipeline.teacher.capture.plan import settle_plan
from pipeline.teacher.capture.survey import Survey, readable_manifest, survey
from pipeline.teacher.capture.task import CaptureTask
from pipeline.teacher.capture.worker import CaptureWorker
from pipeline.teacher.fleet.leases import LEASES, LeaseBoard
from pipeline.teacher.fleet.processes import worker_name
from pipeline.teacher.sparsify.stopwatch import SPARSIFIER

__all__ = ["fill_cache"]

_log = logging.getLogger(__name__)

_ROUNDS = 3
_FOLDERS = (
    "", "_meta", "_meta/shards", "_meta/tokenizer", LEASES, QUARANTINE,
    *(f"data/{split}" for split in SPLITS),
)  # fmt: skip


def fill_cache(
    task: CaptureTask,
    *,
    store: Store,
    command: str,
    resolved_config: str,
    progress_every_s: float,
    retry_quarantined: bool = False,
    shares: Shares | None = None,
) -> Manifest:
    """Capture what is missing of the cache and return its manifest.

    Rows that the teacher cannot answer are quarantined (`cache/layout/quarantine.py`); the cache is
    complete without them, and they are tried again only when `retry_quarantined` asks for it. A run
    over a complete cache compares every checksum, captures damaged shards again to the same bytes,
    and loads no teacher when nothing is missing.

    Raises:
        CacheError: the store holds another identity's cache.
        ModelError: the teacher answers for no row, or for too few.
    """
    shares = shares or Shares()
    shares.inside("teacher", "sparsifier", SPARSIFIER.seconds)
    shares.level(planned_tokens=task.plan.num_tokens)
    settle_plan(store, task.plan, task.identity)
    if retry_quarantined:
        _log.info("%d quarantined rows are tried again", clear_quarantine(store))
    complete = readable_manifest(store)
    found = survey(task.plan, store, check_bytes=complete is not None)
    if not found.missing_tokens and complete is not None:
        _log.info("cache %s is complete, all checksums right", store.url)
        return complete
    if complete is not None:
        # While shards are captured again the cache must not call itself complete.
        store.delete(MANIFEST)
    store.write("_meta/config.yaml", resolved_config.encode())
    files = tokenizer_files(task.teacher.tokenizer)
    for name, data in files.items():
        store.write(f"_meta/tokenizer/{name}", data)
    found = _capture_missing(task, found, store, shares, progress_every_s)
    return _finish(task, found, store, command=command, tokenizer_files=files)


def _capture_missing(
    task: CaptureTask, found: Survey, store: Store, shares: Shares, progress_every_s: float
) -> Survey:
    """Work until every shard has its record; return what is there then."""
    board = LeaseBoard(store, worker_name(), task.settings.lease_s)
    progress = Progress(
        task.plan.num_tokens,
        unit="tokens",
        description="cache-teacher",
        every_s=progress_every_s,
        initial=task.plan.num_tokens - found.missing_tokens,
    )
    worker = CaptureWorker(task, board, progress, shares, bytes_per_token=found.bytes_per_token)
    with progress, board.beating(), worker:
        # A worker that was overtaken may write a recorded shard once more at this moment, and a
        # store may cut that write short: the shard is then captured again, like any damaged one.
        for _ in range(_ROUNDS):
            worker.run()
            found = survey(task.plan, store, check_bytes=False)
            if not found.missing_tokens:
                break
    board.sweep()
    if found.missing_tokens:
        raise CacheError(
            f"{store.url}: a shard disappeared while the cache was made",
            do="run the same command again; it computes only what is missing",
        )
    return found


def _finish(
    task: CaptureTask,
    found: Survey,
    store: Store,
    *,
    command: str,
    tokenizer_files: Collection[str],
) -> Manifest:
    """Write the manifest and remove what killed workers left."""
    counts: dict[str, int] = asdict(task.corpus.counts)
    quarantined = sum(map(len, read_quarantine(store).values()))
    if quarantined:  # no member where there is none: a retry that succeeds leaves no trace
        counts["rows_quarantined"] = quarantined
    manifest = finalize(
        store,
        found.records,
        identity=task.identity,
        spec=task.spec,
        temperatures=task.scheme.temperatures,
        corpus_counts=counts,
        tokenizer_files=sorted(tokenizer_files),
        command=command,
    )
    leftovers = store.remove_partials(_FOLDERS)
    if leftovers:
        _log.info("%d unfinished files of killed workers removed", leftovers)
    return manifest
