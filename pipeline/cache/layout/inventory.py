"""The shards of a cache, complete or not: from its manifest, or from its plan and records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.manifest import (
    Manifest,
    Totals,
    read_manifest,
    shard_identity,
    total_of,
)
from pipeline.cache.layout.names import (
    MANIFEST,
    PLAN,
    RECORDS,
    SPLITS,
    SegmentName,
    shard_label,
)
from pipeline.cache.layout.quarantine import QUARANTINE, QuarantinedRow, decode_quarantine
from pipeline.cache.layout.recorded import Recorded
from pipeline.cache.layout.records import ShardRecord, decode_segment
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.storage.parallel import in_threads

__all__ = [
    "Inventory", "Plan", "PlannedRows", "decode_plan", "encode_plan", "read_inventory",
    "read_segments", "recorded_totals",
]  # fmt: skip

_READS_AT_ONCE = 16
"""Small files read in parallel: an object store answers each in 20 to 50 ms, and there can be
thousands of records."""
_SEGMENTS_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class PlannedRows:
    """One planned shard."""

    split: str
    index: int
    rows: int
    tokens: int
    samples_sha256: str | None
    """`fingerprint` of the list of its sample ids."""

    @property
    def name(self) -> str:
        """The shard's name in leases and lists, such as `train-00000`."""
        return shard_label(self.split, self.index)


@dataclass(frozen=True, slots=True)
class Plan:
    """The content of `_meta/plan.json`."""

    identity: dict[str, Any]
    shards: tuple[PlannedRows, ...]
    """Of a derived cache; stage one's plan knows no more than their number."""
    plan_counts: dict[str, int] = field(default_factory=dict)
    """Shards by split, where the plan knows no more."""

    @property
    def shard_counts(self) -> dict[str, int]:
        """Shards by split; empty while stage one does not know."""
        if not self.shards:
            return self.plan_counts
        planned = [item.split for item in self.shards]
        return {split: planned.count(split) for split in SPLITS if split in planned}


@dataclass(frozen=True, slots=True)
class Inventory:
    """The shards that a cache should hold, from the best source available."""

    manifest: Manifest | None
    plan_raw: bytes | None
    identity: dict[str, Any] | None
    """None where neither the manifest nor the plan can be read."""
    planned: tuple[PlannedRows, ...]
    """The shards of a derived cache's plan."""
    plan_counts: dict[str, int]
    """Shards by split, as the plan says; empty where it does not know yet."""
    recorded: Recorded
    """The shards that a listing of the records' folder names."""
    failed: dict[str, tuple[QuarantinedRow, ...] | None]
    """Quarantined rows, by shard; None for a damaged list."""
    damaged: tuple[tuple[str, str], ...]
    """Files that belong to no single shard and are missing or damaged, each with the reason."""

    @property
    def identity_digest(self) -> str | None:
        """SHA-256 of the identity."""
        return None if self.identity is None else fingerprint(self.identity)

    @property
    def shard_identity(self) -> str | None:
        """The identity digest that every shard carries; None where it is not known or differs."""
        return None if self.identity is None else shard_identity(self.identity)

    def failed_rows(self, shard: str) -> tuple[QuarantinedRow, ...]:
        """Return the rows that a shard such as `train-00000` lacks."""
        return self.failed.get(shard) or ()

    @property
    def shard_counts(self) -> dict[str, int]:
        """Shards by split: of the manifest, else of the plan, else as many as are recorded."""
        if self.manifest is not None:
            return self.manifest.shard_counts
        if self.plan_counts:
            return self.plan_counts
        stops = {s.split: s.last + 1 for s in self.recorded.segments}
        return {split: stops[split] for split in SPLITS if split in stops}

    @property
    def rows_quarantined(self) -> int:
        """The number of rows in all readable lists."""
        return sum(len(rows or ()) for rows in self.failed.values())


def encode_plan(plan: Plan) -> bytes:
    """Return the plan file of a derived cache; of the same form as stage one's."""
    data = {
        "identity": plan.identity,
        "identity_digest": fingerprint(plan.identity),
        "shards": [
            {
                "split": item.split,
                "index": item.index,
                "rows": item.rows,
                "tokens": item.tokens,
                "samples_sha256": item.samples_sha256,
            }
            for item in plan.shards
        ],
    }
    return json.dumps(data, indent=1, ensure_ascii=False).encode()


def decode_plan(raw: bytes) -> Plan | None:
    """Read a plan file; None where it is damaged."""
    try:
        data = json.loads(raw)
        identity = data["identity"]
        if fingerprint(identity) != data["identity_digest"]:
            return None
        listed = data.get("shards", {})
        if isinstance(listed, dict):
            plan_counts = {split: int(listed[split]) for split in SPLITS if split in listed}
            return Plan(identity, (), plan_counts)
        shards = tuple(
            PlannedRows(
                item["split"],
                int(item["index"]),
                int(item["rows"]),
                int(item["tokens"]),
                item["samples_sha256"],
            )
            for item in listed
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return Plan(identity, shards) if all(item.split in SPLITS for item in shards) else None


def read_inventory(store: Store) -> Inventory:
    """Read the inventory of a cache.

    Raises:
        CacheError: there is no manifest, no plan and no shard's record, or the cache is of a
            newer format.
    """
    plan_raw = _read(store, PLAN)
    plan = None if plan_raw is None else decode_plan(plan_raw)
    planned = plan.shards if plan else ()
    plan_counts = plan.shard_counts if plan else {}
    damaged: list[tuple[str, str]] = []
    if plan_raw is not None and plan is None:
        damaged.append((PLAN, "damaged (its digest does not match)"))
    failed = _failed(store)
    files = store.list(RECORDS)
    raw = _read(store, MANIFEST)
    if raw is not None:
        try:
            manifest = read_manifest(store)
            return Inventory(
                manifest,
                plan_raw,
                manifest.identity,
                planned,
                plan_counts,
                Recorded(files),
                failed,
                tuple(damaged),
            )
        except CacheError:
            if _is_whole(raw):
                raise  # newer, not damaged
        damaged.append((MANIFEST, "damaged (its checksum does not match)"))
    recorded = Recorded(files)
    if plan_raw is None and raw is None and not recorded:
        read_manifest(store)  # raises: there is no cache
    identity = plan.identity if plan else None
    found = Inventory(
        None, plan_raw, identity, planned, plan_counts, recorded, failed, tuple(damaged)
    )
    if raw is None:
        counts = found.shard_counts
        missing = sum(counts.values()) - sum(
            recorded.count(split, count) for split, count in counts.items()
        )
        text = f"missing ({missing} shards are not written yet)"
        found = replace(found, damaged=(*damaged, (MANIFEST, text)))
    return found


def read_segments(
    store: Store, inventory: Inventory
) -> Iterator[tuple[SegmentName, list[ShardRecord] | None]]:
    """Yield each segment with its records, those of the first split first; None if it is damaged.

    Of a complete cache the manifest's segments, else those that were listed.
    """
    manifest = inventory.manifest
    if manifest is not None:
        names = [segment.name for segment in manifest.segments]
        checksums = {segment.name: segment.xxh3_128 for segment in manifest.segments}
    else:
        order = {split: place for place, split in enumerate(SPLITS)}
        names = sorted(inventory.recorded.segments, key=lambda s: (order[s.split], s.first))
        checksums = {}

    def read_one(name: SegmentName) -> list[ShardRecord] | None:
        raw = _read(store, name.path)
        if raw is None or checksums.get(name, "") not in ("", checksum(raw)):
            return None
        return decode_segment(raw, name)

    # The folded ones are large.
    at_once = _READS_AT_ONCE if manifest is None else _SEGMENTS_AT_ONCE
    yield from zip(names, in_threads(read_one, names, at_once), strict=True)


def recorded_totals(store: Store, inventory: Inventory) -> dict[str, Totals]:
    """Return the sums of each split: from the manifest, else from the records that are there."""
    if inventory.manifest is not None:
        return {split: inventory.manifest.total(split) for split in SPLITS}
    found: dict[tuple[str, int], ShardRecord] = {}
    for _, records in read_segments(store, inventory):
        for record in records or ():
            # What is summed stays, not the rows.
            found[record.key] = replace(record, row_tokens=(), row_loss_tokens=(), row_ids=b"")
    return {
        split: total_of([record for key, record in found.items() if key[0] == split])
        for split in SPLITS
    }


def _failed(store: Store) -> dict[str, tuple[QuarantinedRow, ...] | None]:
    """Return the lists of quarantined rows; a damaged list is left, where stage one removes it."""
    names = [name for name in store.list(QUARANTINE) if name.endswith(".json")]
    shards = [name.removesuffix(".json") for name in names]
    raws = in_threads(lambda name: _read(store, f"{QUARANTINE}/{name}"), names, _READS_AT_ONCE)
    return {
        shard: decode_quarantine(raw, shard)
        for shard, raw in zip(shards, raws, strict=True)
        if raw is not None
    }


def _is_whole(manifest: bytes) -> bool:
    try:
        data = json.loads(manifest)
        stored = data.pop("manifest_sha256")
        return bool(fingerprint(data) == stored and data.get("format") == "distill-cache")
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _read(store: Store, name: str) -> bytes | None:
    try:
        return store.read(name)
    except FileNotFoundError:
        return None
