"""A cache that is there already: whose it is, and whether all of it is."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

from pipeline.cache.layout.fold import reopen
from pipeline.cache.layout.manifest import Manifest, read_manifest
from pipeline.cache.layout.names import (
    MANIFEST,
    PLAN,
    RECORDS,
    RESPONSE_UNITS,
    RESPONSES,
    SPLITS,
)
from pipeline.cache.layout.quarantine import QUARANTINE, read_quarantine
from pipeline.cache.tools.verify import find_damaged
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.storage.parallel import default_workers
from pipeline.teacher.capture.identity import as_begun
from pipeline.teacher.capture.plan import (
    another_identity,
    begun_identity,
    complete_plan,
    identity_difference,
)
from pipeline.teacher.fleet.leases import LEASES, remove_leases

__all__ = ["LEFTOVER_FOLDERS", "clear_leftovers", "complete_cache", "finished_cache"]

LEFTOVER_FOLDERS = (
    "", "_meta", RECORDS, "_meta/tokenizer", LEASES, QUARANTINE, RESPONSES,
    *(f"{RESPONSE_UNITS}/{name}" for name in ("summaries", "tokens")),
    *(f"data/{split}" for split in SPLITS),
)  # fmt: skip
"""Where killed workers leave unfinished files."""
_SIZES_UP_TO = 2048
"""Shards of a complete cache whose sizes are compared at each start: in at most 10 requests. A
listing of 200,000 shards is 200, of each worker."""

_log = logging.getLogger(__name__)


def complete_cache(store: Store, identity: dict[str, Any], *, checksums: bool) -> Manifest | None:
    """Return the manifest of a cache that needs no work; None where something is missing.

    What is not as it was recorded is unrecorded, for the capture to make again: a shard of another
    size (of caches up to 2,048 shards), of another checksum where that is asked for, a shard whose
    list of quarantined rows is lost.

    Args:
        store: the cache's root.
        identity: as far as it is known before the teacher is asked anything.
        checksums: read every shard.

    Raises:
        CacheError: the folder holds a cache, or the start of one, of another identity; or records
            are missing, which `repair` writes again.
    """
    manifest = finished_cache(store, identity)
    if manifest is None:
        return None
    if not store.exists(PLAN):
        complete_plan(store, manifest.identity, manifest.shard_counts)
    lacking = sum(map(len, read_quarantine(store).values()))
    if lacking != manifest.corpus_counts.get("rows_quarantined", 0):
        _log.warning("%s: a list of quarantined rows is lost: they are tried again", store.url)
        store.delete(MANIFEST)
        return None
    if checksums or manifest.total().shards <= _SIZES_UP_TO:
        check = "checksum" if checksums else "size"
        damaged = find_damaged(store, manifest, default_workers(), check)
        for finding in damaged:
            _log.warning("%s: %s; captured again", store.full_url(finding.name), finding.reason)
        reopen(store, [finding.shard for finding in damaged if finding.shard is not None])
        if damaged:
            return None
    clear_leftovers(store)
    return manifest


def finished_cache(store: Store, identity: dict[str, Any]) -> Manifest | None:
    """Return the manifest of a complete cache of this identity, as far as it is known beforehand.

    A damaged manifest counts as none: it is written again.

    Raises:
        CacheError: the folder holds a cache, or the start of one, of another identity.
    """
    manifest = None
    if store.exists(MANIFEST):
        with suppress(CacheError):
            manifest = read_manifest(store)
    begun = as_begun(identity)
    found = as_begun(manifest.identity) if manifest is not None else begun_identity(store)
    if found is not None and found != begun:
        raise another_identity(store, identity_difference(found, begun))
    return manifest


def clear_leftovers(store: Store) -> None:
    """Remove from a complete cache what a worker left that was killed at its last step.

    The manifest stands then, and the lease of it as well; one listing where there is none.
    """
    if remove_leases(store):
        store.remove_partials(LEFTOVER_FOLDERS)
