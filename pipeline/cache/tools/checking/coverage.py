"""Check that a cache holds what was planned and no more: plan, quarantine lists, stray files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.cache.layout.embedded_checksum import has_valid_checksum
from pipeline.cache.layout.inventory import Inventory, PlannedRows, decode_plan
from pipeline.cache.layout.names import (
    PLAN,
    RECORDS,
    RESPONSE_PLAN,
    RESPONSES,
    SPLITS,
    parse_segment,
    parse_shard,
    record_name,
    response_name,
    shard_label,
    shard_name,
)
from pipeline.cache.layout.quarantine import quarantine_name
from pipeline.cache.layout.records import ShardRecord
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
        keys = {(item.split, item.index) for item in plan.shards}
        counts = manifest.shard_counts
        wanted, planned = sum(counts.values()), sum(plan.shard_counts.values())
        if (planned and plan.shard_counts != counts) or any(
            (split, index) not in keys
            for split, count in counts.items()
            for index in range(count if keys else 0)
        ):
            yield Finding(PLAN, f"plans {planned} shards, the manifest lists {wanted}")
    if manifest is None:
        for split, count in plan.shard_counts.items():
            for index in inventory.recorded.missing(split, count):
                key = split, index
                yield Finding(record_name(*key), "planned, not written yet", key)


def failed_findings(
    inventory: Inventory, lacking: Mapping[tuple[str, int], int]
) -> Iterator[Finding]:
    """Yield quarantine lists that are damaged, lost, or of no shard.

    Stage one and `repair` compute a shard again whose list is lost or damaged.

    Args:
        inventory: of the cache.
        lacking: how many of its planned rows a recorded shard lacks, where it lacks any.
    """
    counts = inventory.shard_counts
    for shard, rows in inventory.failed.items():
        key = parse_shard(shard)
        known = key is not None and key[1] < counts.get(key[0], 0)
        if rows is None:
            held = key if key is not None and known and key in inventory.recorded else None
            yield Finding(quarantine_name(shard), "damaged (its checksum does not match)", held)
        elif not known and counts:
            yield Finding(quarantine_name(shard), "belongs to no shard of this cache", stray=True)
    told = inventory.manifest.corpus_counts if inventory.manifest else {}
    if told.get("rows_quarantined", 0) <= inventory.rows_quarantined:
        return
    for key, number in lacking.items():
        if shard_label(*key) not in inventory.failed:
            text = f"missing: {number} rows of {shard_name(*key)} were quarantined"
            yield Finding(quarantine_name(shard_label(*key)), text, key)


def stray_findings(store: Store, inventory: Inventory) -> Iterator[Finding]:
    """Yield files of no shard: other readers read every Parquet file of a split."""
    counts = inventory.shard_counts
    known = inventory.manifest is not None or bool(inventory.plan_counts)
    reason = "belongs to no shard of this cache" if known else "there is no intact record of it"
    for split in SPLITS:
        for file in store.list(f"data/{split}"):
            stem = file.removesuffix(".parquet")
            key = parse_shard(f"{split}-{stem}") if file.endswith(".parquet") else None
            if file.endswith(".parquet") and (key is None or key[1] >= counts.get(split, 0)):
                yield Finding(f"data/{split}/{file}", reason, stray=True)
    if inventory.manifest is not None:
        listed = {segment.name for segment in inventory.manifest.segments}
    else:
        listed = {s for s in inventory.recorded.segments if s.last < counts.get(s.split, 0)}
    for file in store.list(RECORDS):
        if parse_segment(file) not in listed:
            yield Finding(f"{RECORDS}/{file}", reason, stray=True)


def response_findings(store: Store) -> Iterator[Finding]:
    """Yield files of the responses that are damaged, missing, or more than were planned."""
    files = (name for name in store.list(RESPONSES) if name.endswith(".parquet"))
    present = {f"{RESPONSES}/{name}" for name in files}
    planned = None
    try:
        # At first the plan knows no number: prompts are prepared while others are answered.
        number = json.loads(store.read(RESPONSE_PLAN)).get("shards")
        planned = None if number is None else int(number)
    except FileNotFoundError:
        if present:
            yield Finding(RESPONSE_PLAN, "missing")
    except (ValueError, AttributeError, TypeError):
        yield Finding(RESPONSE_PLAN, "damaged")
    wanted = {response_name(index) for index in range(planned or 0)}
    for name in sorted(wanted | present):
        if name not in present:
            yield Finding(name, "missing")
        elif planned is not None and name not in wanted:
            yield Finding(name, "belongs to no shard of this cache", stray=True)
        elif not has_valid_checksum(store.read(name)):
            yield Finding(name, "damaged (its checksum does not match)")


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
