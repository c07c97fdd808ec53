"""Check that a cache holds what was planned and no more: plan, quarantine lists, stray files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.cache.layout.embedded_checksum import has_valid_checksum
from pipeline.cache.layout.inventory import Inventory, PlannedRows, decode_plan
from pipeline.cache.layout.manifest import (
    PLAN,
    RESPONSES,
    SPLITS,
    ShardRecord,
    record_name,
    shard_name,
)
from pipeline.cache.layout.quarantine import quarantine_name
from pipeline.storage import Store

__all__ = [
    "Finding",
    "failed_findings",
    "plan_findings",
    "plan_reason",
    "response_findings",
    "stray_findings",
]


@dataclass(frozen=True, slots=True)
class Finding:
    """One file that is damaged, missing, or does not belong to the cache."""

    name: str
    """Relative to the cache."""
    reason: str
    shard: tuple[str, int] | None = None
    """Split and index of the shard to be written again; None for files of no single shard."""
    stray: bool = False
    """The file belongs to no shard of the cache."""


def plan_findings(store: Store, inventory: Inventory) -> Iterator[Finding]:
    """Yield what is wrong with the plan: it must list each shard once, and no other."""
    manifest = inventory.manifest
    if inventory.plan_raw is None:
        if store.exists("_meta/config.yaml"):
            yield Finding(PLAN, "missing")
        return
    plan = decode_plan(inventory.plan_raw)
    if plan is None:
        return  # the inventory has reported it
    as_written = json.dumps(json.loads(inventory.plan_raw), indent=1, ensure_ascii=False).encode()
    if as_written != inventory.plan_raw:
        yield Finding(PLAN, "not as it was written (white space or number format)")
    elif manifest is not None and plan.identity != manifest.identity:
        yield Finding(PLAN, "of another identity than the manifest")
    elif manifest is not None:
        planned = [(item.split, item.index) for item in plan.shards]
        listed = [(record.split, record.index) for record in manifest.shards]
        if sorted(planned) != sorted(listed):
            yield Finding(PLAN, f"plans {len(planned)} shards, the manifest lists {len(listed)}")
    if manifest is None:
        have = {(record.split, record.index) for record in inventory.records}
        files = set(store.list("_meta/shards"))
        for item in plan.shards:
            if (item.split, item.index) not in have:
                name = record_name(item.split, item.index)
                there = name.rsplit("/", 1)[-1] in files
                reason = "damaged" if there else "planned, not written yet"
                yield Finding(name, reason, (item.split, item.index))


def failed_findings(inventory: Inventory) -> Iterator[Finding]:
    """Yield quarantine lists that are damaged, lost, or of no shard.

    Stage one and `repair` compute a shard again whose list is lost or damaged.
    """
    planned = {item.name: item for item in inventory.planned}
    held = {f"{record.split}-{record.index:05d}": record for record in inventory.records}
    for shard, rows in inventory.failed.items():
        record = held.get(shard)
        if rows is None:
            key = (record.split, record.index) if record else None
            yield Finding(quarantine_name(shard), "damaged (its checksum does not match)", key)
        elif shard not in planned and shard not in held and (planned or held):
            yield Finding(quarantine_name(shard), "belongs to no shard of this cache", stray=True)
    counts = inventory.manifest.corpus_counts if inventory.manifest else {}
    if counts.get("rows_quarantined", 0) <= inventory.rows_quarantined:
        return
    for shard, item in planned.items():
        record = held.get(shard)
        if record is not None and record.rows < item.rows and shard not in inventory.failed:
            text = f"missing: {item.rows - record.rows} rows of {record.path} were quarantined"
            yield Finding(quarantine_name(shard), text, (record.split, record.index))


def stray_findings(store: Store, inventory: Inventory) -> Iterator[Finding]:
    """Yield files of no shard: other readers read every Parquet file of a split."""
    keys = {(record.split, record.index) for record in inventory.records}
    keys |= {(item.split, item.index) for item in inventory.planned}
    shards = {shard_name(*key) for key in keys}
    known = inventory.manifest is not None or bool(inventory.planned)
    reason = "belongs to no shard of this cache" if known else "there is no intact record of it"
    for split in SPLITS:
        for file in store.list(f"data/{split}"):
            name = f"data/{split}/{file}"
            if file.endswith(".parquet") and name not in shards:
                yield Finding(name, reason, stray=True)
    records = {record_name(*key) for key in keys}
    for file in store.list("_meta/shards"):
        if f"_meta/shards/{file}" not in records:
            yield Finding(f"_meta/shards/{file}", reason, stray=True)


def response_findings(store: Store) -> Iterator[Finding]:
    """Yield damaged or missing files of the responses, from which shards are computed."""
    present = set(store.list(RESPONSES))
    try:
        planned = int(json.loads(store.read(f"{RESPONSES}/plan.json"))["shards"])
    except FileNotFoundError:
        planned = 0
    except (ValueError, KeyError, TypeError):
        yield Finding(f"{RESPONSES}/plan.json", "damaged")
        planned = 0
    wanted = {f"{index:05d}.parquet" for index in range(planned)}
    for file in sorted(wanted | {name for name in present if name.endswith(".parquet")}):
        if file not in present:
            yield Finding(f"{RESPONSES}/{file}", "missing")
        elif not has_valid_checksum(store.read(f"{RESPONSES}/{file}")):
            yield Finding(f"{RESPONSES}/{file}", "damaged (its checksum does not match)")


def plan_reason(plan: PlannedRows, listed: ShardRecord, inventory: Inventory) -> str:
    """Describe how a shard differs from its plan; quarantined rows are planned but not in it."""
    if inventory.failed.get(plan.name, ()) is None:
        return ""  # the damaged list has been reported
    missing = len(inventory.failed_rows(plan.name))
    if plan.rows == listed.rows + missing and (plan.tokens == listed.tokens or missing):
        return ""
    counts = inventory.manifest.corpus_counts if inventory.manifest else {}
    lost = counts.get("rows_quarantined", 0) > inventory.rows_quarantined
    if lost and listed.rows < plan.rows and plan.name not in inventory.failed:
        return ""  # the lost list has been reported
    text = f"plans {plan.rows} rows of {plan.tokens} tokens for {listed.path}"
    quarantined = f", and {missing} quarantined" if missing else ""
    return f"{text}, which has {listed.rows} of {listed.tokens}{quarantined}"
