"""The capture from beginning to end: what is there, what is missing, the manifest of all."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import asdict

from pipeline.cache.io.finalize import ShardsMissing, finalize
from pipeline.cache.layout.manifest import Manifest
from pipeline.cache.layout.names import MANIFEST, RECORDS, SPLITS
from pipeline.cache.layout.quarantine import QUARANTINE, clear_quarantine, read_quarantine
from pipeline.models.tokenizer import tokenizer_files
from pipeline.observe.shares import Shares
from pipeline.progress import Progress
from pipeline.storage import Store
from pipeline.teacher.capture.plan import settle_plan
from pipeline.teacher.capture.survey import (
    Survey,
    covering,
    is_all_of,
    readable_manifest,
    survey,
)
from pipeline.teacher.capture.task import CaptureTask
from pipeline.teacher.capture.worker import CaptureWorker
from pipeline.teacher.fleet.leases import LEASES, LeaseBoard
from pipeline.teacher.fleet.processes import worker_name
from pipeline.teacher.sparsify.stopwatch import SPARSIFIER

__all__ = ["fill_cache"]

_log = logging.getLogger(__name__)

_ROUNDS = 3
_FOLDERS = (
    "", "_meta", RECORDS, "_meta/tokenizer", LEASES, QUARANTINE,
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
    over a complete cache reads its manifest and no more, and loads no teacher.

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
    if complete is not None:
        if is_all_of(complete, task.plan, read_quarantine(store), task.identity_digest):
            _log.info("cache %s is complete", store.url)
            return complete
        # While shards are captured again the cache must not call itself complete.
        store.delete(MANIFEST)
    found = survey(task.plan, store)
    store.write("_meta/config.yaml", resolved_config.encode())
    files = tokenizer_files(task.teacher.tokenizer)
    for name, data in files.items():
        store.write(f"_meta/tokenizer/{name}", data)
    manifest = _capture_missing(
        task, found, store, shares, progress_every_s, command=command, tokenizer_files=files
    )
    leftovers = store.remove_partials(_FOLDERS)
    if leftovers:
        _log.info("%d unfinished files of killed workers removed", leftovers)
    return manifest


def _capture_missing(
    task: CaptureTask,
    found: Survey,
    store: Store,
    shares: Shares,
    progress_every_s: float,
    *,
    command: str,
    tokenizer_files: Collection[str],
) -> Manifest:
    """Work until every shard has its record, and write the manifest."""
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
        for rounds_left in reversed(range(_ROUNDS)):
            worker.run()
            board.sweep()
            try:
                return _finish(task, store, command=command, tokenizer_files=tokenizer_files)
            except ShardsMissing:
                if not rounds_left:
                    raise
    raise AssertionError  # the last round returns or raises


def _finish(
    task: CaptureTask, store: Store, *, command: str, tokenizer_files: Collection[str]
) -> Manifest:
    """Write the manifest."""
    quarantined = read_quarantine(store)
    return finalize(
        store,
        task.plan.counts,
        identity=task.identity,
        spec=task.spec,
        temperatures=task.scheme.temperatures,
        corpus_counts=asdict(task.corpus.counts),
        tokenizer_files=sorted(tokenizer_files),
        command=command,
        rows_quarantined=sum(map(len, quarantined.values())),
        accept=covering(task.plan, quarantined),
    )
