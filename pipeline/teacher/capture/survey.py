"""What is there of a cache when a run begins: intact records, and how much is missing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.cache.io.writer import intact_record
from pipeline.cache.layout.manifest import (
    MANIFEST,
    Manifest,
    ShardRecord,
    read_manifest,
    record_name,
)
from pipeline.cache.layout.quarantine import QuarantinedRow, read_quarantine
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.teacher.capture.plan import PlannedShard, WorkPlan

__all__ = ["Survey", "readable_manifest", "survey"]

_log = logging.getLogger(__name__)

_LOOKS_AT_ONCE = 16
"""Records looked at side by side: an object store answers each in 20 to 50 ms, and there are
thousands."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What is there."""

    records: list[ShardRecord]
    missing_tokens: int

    @property
    def bytes_per_token(self) -> float:
        """The largest of any shard; 0 where there is none."""
        return max((r.bytes / r.tokens for r in self.records if r.tokens), default=0.0)


def survey(plan: WorkPlan, store: Store, *, check_bytes: bool) -> Survey:
    """Look at every shard, and remove the records of damaged ones: they are captured again.

    A run that goes on trusts sizes: reading back all of a large cache at each restart would cost
    more than the work lost. Readers compare checksums anyway.
    """
    recorded = set(store.list("_meta/shards"))
    failures = read_quarantine(store)

    def look(shard: PlannedShard) -> ShardRecord | None:
        if shard.file_name not in recorded:
            return None
        record = intact_record(store, shard.split, shard.index, check_bytes=check_bytes)
        if record is None or not _is_covered(shard, record, failures):
            store.delete(record_name(shard.split, shard.index))
            return None
        return record

    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        found = list(pool.map(look, plan.shards))
    missing = sum(
        shard.num_tokens for shard, record in zip(plan.shards, found, strict=True) if record is None
    )
    return Survey([record for record in found if record is not None], missing)


def readable_manifest(store: Store) -> Manifest | None:
    """Return the manifest where there is a readable one; a damaged one is written again."""
    if not store.exists(MANIFEST):
        return None
    try:
        return read_manifest(store)
    except CacheError as error:
        _log.warning("%s", error)
        return None


def _is_covered(
    shard: PlannedShard, record: ShardRecord, failures: Mapping[str, tuple[QuarantinedRow, ...]]
) -> bool:
    """Whether the rows of the record and the quarantined ones are the rows of the plan."""
    return record.rows + len(failures.get(shard.name, ())) == len(shard.samples)
