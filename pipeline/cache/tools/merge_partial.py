"""Join parts of one cache that workers wrote to different stores, by checksum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pipeline.cache.io.tables import read_shard
from pipeline.cache.layout.inventory import (
    Inventory,
    Plan,
    PlannedRows,
    decode_plan,
    encode_plan,
    read_inventory,
)
from pipeline.cache.layout.manifest import (
    RESPONSES,
    ShardRecord,
    checksum,
    decode_record,
    record_name,
    tokenizer_name,
)
from pipeline.cache.layout.quarantine import decode_quarantine, quarantine_name
from pipeline.cache.layout.schema import read_spec
from pipeline.cache.tools.derive import derived_counts, fill, finish, reserve_folder
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = ["merge_parts"]

_CONFIG = "_meta/config.yaml"
_Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A shard in one of the sources."""

    store: Store
    record: ShardRecord

    def read(self, item: PlannedRows) -> tuple[ShardRecord, bytes, bytes | None] | None:
        """Return record, file and list of quarantined rows; None if one of them is damaged."""
        try:
            record = decode_record(self.store.read(record_name(item.split, item.index)))
            if record is None or record.xxh3_128 != self.record.xxh3_128:
                return None
            failed = None
            if record.rows != item.rows:
                failed = self.store.read(quarantine_name(item.name))
                rows = decode_quarantine(failed, item.name)
                if rows is None or record.rows + len(rows) != item.rows:
                    return None
            return record, read_shard(self.store, record), failed
        except (CacheError, FileNotFoundError):
            return None


@dataclass(frozen=True, slots=True)
class _Parts:
    """Caches of one identity, complete or not."""

    stores: Sequence[Store]
    inventories: Sequence[Inventory]

    @property
    def whole(self) -> Inventory | None:
        """The first inventory that has a manifest."""
        return next((inventory for inventory in self.inventories if inventory.manifest), None)

    def found(self) -> dict[tuple[str, int], list[_Candidate]]:
        """Return the sources of each shard, those with the most of its planned rows first."""
        found: dict[tuple[str, int], list[_Candidate]] = {}
        for store, inventory in zip(self.stores, self.inventories, strict=True):
            for record in inventory.records:
                candidate = _Candidate(store, record)
                found.setdefault((record.split, record.index), []).append(candidate)
        return {
            key: sorted(candidates, key=lambda candidate: -candidate.record.rows)
            for key, candidates in found.items()
        }

    def plan(self) -> tuple[Plan, bytes]:
        """Return the plan and its file: stage one's where one has it, else from a manifest."""
        for inventory in self.inventories:
            plan = decode_plan(inventory.plan_raw) if inventory.plan_raw else None
            if plan is not None and inventory.plan_raw is not None:
                return plan, inventory.plan_raw
        assert self.whole is not None
        assert self.whole.identity is not None
        shards = [
            PlannedRows(
                record.split,
                record.index,
                record.rows + len(self.whole.failed_rows(f"{record.split}-{record.index:05d}")),
                record.tokens,
                None,
            )
            for record in self.whole.records
        ]
        plan = Plan(self.whole.identity, tuple(shards))
        return plan, encode_plan(plan)

    def tokenizer(self) -> dict[str, bytes]:
        """Return the tokenizer's files, checked against the manifest where there is one."""
        for store, inventory in zip(self.stores, self.inventories, strict=True):
            names = inventory.manifest.tokenizer_xxh3_128 if inventory.manifest else {}
            names = names or dict.fromkeys(store.list("_meta/tokenizer"), "")
            try:
                files = {name: store.read(tokenizer_name(name)) for name in names}
            except FileNotFoundError:
                continue
            if files and all(checksum(files[n]) == x or not x for n, x in names.items()):
                return files
        raise CacheError(f"{self.stores[0].url}: no source has an intact _meta/tokenizer")

    def config(self) -> bytes | None:
        """Return stage one's configuration, so that `repair` works on the merged cache."""
        return next((s.read(_CONFIG) for s in self.stores if s.exists(_CONFIG)), None)


def merge_parts(
    target: Store,
    sources: Sequence[Store],
    inventories: Sequence[Inventory],
    *,
    command: str,
    on_start: _Progress,
    on_rows: _Progress,
) -> int:
    """Write the union of the intact shards to `target`, byte for byte; return its rows.

    If different rows of a shard are quarantined in two sources, the shard with more rows is taken,
    with its quarantine list.

    Args:
        target: the new cache's root.
        sources: of one identity, complete or not.
        inventories: of the sources.
        command: for the card.
        on_start: called with the number of rows to write.
        on_rows: called with the number of rows written.

    Raises:
        CacheError: the sources hold different shards, or no source has some shard (the others have
            been written, without a manifest), or the target cannot be used.
    """
    parts = _Parts(sources, inventories)
    plan, raw = parts.plan()
    found = parts.found()
    differ = [
        f"{one.store.full_url(one.record.path)} and {two.store.full_url(two.record.path)}"
        for candidates in found.values()
        for one, two in pairwise(candidates)
        # A row on which one worker's engine fails may have succeeded on another's.
        if one.record.rows == two.record.rows and one.record.xxh3_128 != two.record.xxh3_128
    ]
    if differ:
        raise CacheError(
            "caches of one identity hold different shards:\n  - " + "\n  - ".join(differ) + "\n",
            do="verify each cache; on one kind of machine every worker writes the same bytes for "
            "a shard",
        )
    reserve_folder(target, plan, raw)
    config = parts.config()
    if config is not None:
        target.write(_CONFIG, config)
    _copy_responses(parts.stores, target)

    def make(place: int) -> tuple[ShardRecord, bytes] | None:
        item = plan.shards[place]
        for candidate in found.get((item.split, item.index), []):
            part = candidate.read(item)
            if part is not None:
                record, data, failed = part
                # The list before the record, as in stage one: together they are the plan's rows.
                target.delete(quarantine_name(item.name))
                if failed is not None:
                    target.write(quarantine_name(item.name), failed)
                return record, data
        return None

    best = [found.get((item.split, item.index), []) for item in plan.shards]
    wanted = [
        replace(item, rows=those[0].record.rows, tokens=those[0].record.tokens) if those else item
        for item, those in zip(plan.shards, best, strict=True)
    ]
    on_start(sum(item.rows for item in wanted))
    records = fill(target, wanted, make, on_rows)
    if len(records) < len(plan.shards):
        have = {(record.split, record.index) for record in records}
        keys = [(item.split, item.index) for item in plan.shards]
        names = [f"{split}/{index:05d}" for split, index in keys if (split, index) not in have]
        more = ", ..." if len(names) > 8 else ""
        raise CacheError(
            f"{target.url}: {len(records)} of {len(plan.shards)} shards are there; no source has "
            f"an intact {', '.join(names[:8])}{more}",
            do=f"run cache-teacher with --cache_dir {target.url}, which computes only those, or "
            "merge again with a cache that has them",
        )
    whole = parts.whole.manifest if parts.whole else None
    scheme = plan.identity["scheme"]
    counts = dict(whole.corpus_counts) if whole else derived_counts(records)
    counts.pop("rows_quarantined", None)
    quarantined = read_inventory(target).rows_quarantined
    if quarantined:
        counts["rows_quarantined"] = quarantined
    finish(
        target,
        records,
        identity=plan.identity,
        spec=read_spec(whole.codec if whole else plan.identity["codec"]),
        temperatures=whole.temperatures if whole else scheme["temperatures"],
        tokenizer=parts.tokenizer(),
        corpus_counts=counts,
        command=command,
    )
    return sum(record.rows for record in records)


def _copy_responses(sources: Sequence[Store], target: Store) -> None:
    """Copy the responses: without them, stage one would generate all of them again."""
    for source in sources:
        for file in source.list(RESPONSES):
            name = f"{RESPONSES}/{file}"
            if not target.exists(name):
                target.create(name, source.read(name))
