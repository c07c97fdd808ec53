"""What is there of a cache when a run begins: which shards are recorded, and what is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.cache.io.finalize import recorded_shards
from pipeline.cache.layout.manifest import Manifest, read_manifest
from pipeline.cache.layout.names import MANIFEST, shard_label
from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.cache.layout.records import ShardRecord
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.teacher.capture.plan import WorkPlan

__all__ = ["Survey", "covering", "is_all_of", "readable_manifest", "survey"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Survey:
    """What is there."""

    missing_tokens: int
    bytes_per_token: float
    """The largest of any shard; 0 where there is none."""


def survey(plan: WorkPlan, store: Store) -> Survey:
    """Look which shards have a record and a file, by three listings; no record is read.

    The records of shards without a file are removed: these shards are captured again. Sizes are
    compared when the cache is finished.
    """
    sizes = recorded_shards(store, plan.counts)
    found = [(shard, sizes.get((shard.split, shard.index))) for shard in plan.shards]
    return Survey(
        missing_tokens=sum(shard.num_tokens for shard, size in found if size is None),
        bytes_per_token=max(
            (size / shard.num_tokens for shard, size in found if size and shard.num_tokens),
            default=0.0,
        ),
    )


def readable_manifest(store: Store) -> Manifest | None:
    """Return the manifest where there is a readable one; a damaged one is written again."""
    if not store.exists(MANIFEST):
        return None
    try:
        return read_manifest(store)
    except CacheError as error:
        _log.warning("%s", error)
        return None


def is_all_of(
    manifest: Manifest,
    plan: WorkPlan,
    quarantined: Mapping[str, tuple[QuarantinedRow, ...]],
    identity_digest: str,
) -> bool:
    """Whether the manifest is that of the whole plan; its checksum covers what it says."""
    rows = manifest.total().rows + sum(map(len, quarantined.values()))
    return (
        manifest.identity_digest == identity_digest
        and manifest.shard_counts == plan.counts
        and rows == plan.num_rows
    )


def covering(
    plan: WorkPlan, quarantined: Mapping[str, tuple[QuarantinedRow, ...]]
) -> Callable[[ShardRecord], bool]:
    """Return whether the rows of a record and the quarantined ones are the rows of the plan."""
    planned = {(shard.split, shard.index): len(shard.samples) for shard in plan.shards}

    def is_covered(record: ShardRecord) -> bool:
        lacking = len(quarantined.get(shard_label(*record.key), ()))
        return record.rows + lacking == planned.get(record.key)

    return is_covered
