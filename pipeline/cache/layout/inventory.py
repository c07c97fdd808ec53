"""The shards of a cache, complete or not: from its manifest, or from its plan and records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pipeline.cache.layout.manifest import (
    MANIFEST,
    PLAN,
    SPLITS,
    Manifest,
    ShardRecord,
    decode_record,
    read_manifest,
    record_name,
)
from pipeline.cache.layout.quarantine import QUARANTINE, QuarantinedRow, decode_quarantine
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.storage.parallel import in_threads

__all__ = ["Inventory", "Plan", "PlannedRows", "decode_plan", "encode_plan", "read_inventory"]

_READS_AT_ONCE = 16
"""Small files read in parallel: an object store answers each in 20 to 50 ms, and there can be
thousands of records."""


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
        return f"{self.split}-{self.index:05d}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The content of `_meta/plan.json`."""

    identity: dict[str, Any]
    shards: tuple[PlannedRows, ...]


@dataclass(frozen=True, slots=True)
class Inventory:
    """The shards that a cache should hold, from the best source available."""

    manifest: Manifest | None
    plan_raw: bytes | None
    identity: dict[str, Any] | None
    """None where neither the manifest nor the plan can be read."""
    planned: tuple[PlannedRows, ...]
    records: tuple[ShardRecord, ...]
    """Those of the manifest; without one, the intact records of committed shards."""
    failed: dict[str, tuple[QuarantinedRow, ...] | None]
    """Quarantined rows, by shard; None for a damaged list."""
    damaged: tuple[tuple[str, str], ...]
    """Files that belong to no single shard and are missing or damaged, each with the reason."""

    @property
    def identity_digest(self) -> str | None:
        """SHA-256 of the identity."""
        return None if self.identity is None else fingerprint(self.identity)

    def failed_rows(self, shard: str) -> tuple[QuarantinedRow, ...]:
        """Return the rows that a shard such as `train-00000` lacks."""
        return self.failed.get(shard) or ()

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
        shards = tuple(
            PlannedRows(
                item["split"],
                int(item["index"]),
                int(item["rows"]),
                int(item["tokens"]),
                item["samples_sha256"],
            )
            for item in data["shards"]
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
    damaged: list[tuple[str, str]] = []
    if plan_raw is not None and plan is None:
        damaged.append((PLAN, "damaged (its digest does not match)"))
    failed = _failed(store)
    raw = _read(store, MANIFEST)
    if raw is not None:
        try:
            manifest = read_manifest(store)
            return Inventory(
                manifest,
                plan_raw,
                manifest.identity,
                planned,
                manifest.shards,
                failed,
                tuple(damaged),
            )
        except CacheError:
            if _is_whole(raw):
                raise  # newer, not damaged
        damaged.append((MANIFEST, "damaged (its checksum does not match)"))
    records = _records(store)
    if plan_raw is None and raw is None and not records:
        read_manifest(store)  # raises: there is no cache
    if raw is None:
        missing = len(planned) - len(records)
        damaged.append((MANIFEST, f"missing ({missing} shards are not written yet)"))
    identity = plan.identity if plan else None
    return Inventory(None, plan_raw, identity, planned, records, failed, tuple(damaged))


def _records(store: Store) -> tuple[ShardRecord, ...]:
    """Return the intact records of committed shards, in the manifest's order."""

    def read_one(file: str) -> ShardRecord | None:
        raw = _read(store, f"_meta/shards/{file}")
        record = None if raw is None else decode_record(raw)
        if record is None or not record_name(record.split, record.index).endswith(f"/{file}"):
            return None
        return record

    read = in_threads(read_one, store.list("_meta/shards"), _READS_AT_ONCE)
    found = [record for record in read if record is not None]
    return tuple(sorted(found, key=lambda record: (SPLITS.index(record.split), record.index)))


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
