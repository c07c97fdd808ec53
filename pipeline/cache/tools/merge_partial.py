"""Join parts of one cache that workers wrote to different stores, by checksum."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from pipeline.cache.io.tables import read_shard
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.fold import read_block, reopen
from pipeline.cache.layout.inventory import (
    Inventory,
    Plan,
    PlannedRows,
    decode_plan,
    encode_plan,
    read_inventory,
    read_segments,
)
from pipeline.cache.layout.names import (
    ENVIRONMENT,
    SEGMENT_SHARDS,
    SegmentName,
    shard_label,
    shard_name,
    tokenizer_name,
)
from pipeline.cache.layout.quarantine import (
    decode_quarantine,
    quarantine_name,
    read_quarantine,
)
from pipeline.cache.layout.records import ShardRecord
from pipeline.cache.layout.schema import read_spec
from pipeline.cache.tools.derive import fill, finish, reserve_folder
from pipeline.cache.tools.merge_text import find_text
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = ["merge_parts"]

_SETTINGS = ("_meta/config.yaml", "_meta/fitted_tau.json", ENVIRONMENT)
"""Stage one's: `repair` works with the first, and tau fitted again might be another."""
_Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A shard in one of the sources, without its rows."""

    source: int
    rows: int
    tokens: int
    xxh3_128: str
    made_from: str
    """Checksum of the prepared text; empty where it is not known."""


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
        for number, (store, inventory) in enumerate(
            zip(self.stores, self.inventories, strict=True)
        ):
            for _, records in read_segments(store, inventory):
                for record in records or ():
                    candidate = _Candidate(
                        number, record.rows, record.tokens, record.xxh3_128, record.source_xxh3_128
                    )
                    others = found.setdefault(record.key, [])
                    if candidate not in others:  # of two files of records
                        others.append(candidate)
        for candidates in found.values():
            candidates.sort(key=lambda candidate: -candidate.rows)
        return found

    def plan(self) -> tuple[Plan, bytes]:
        """Return the plan and its file: stage one's where one has it, else from a manifest."""
        for inventory in self.inventories:
            plan = decode_plan(inventory.plan_raw) if inventory.plan_raw else None
            if plan is not None and inventory.plan_raw is not None and plan.shard_counts:
                return self._with_rows(plan), inventory.plan_raw
        if self.whole is None or self.whole.identity is None:
            raise CacheError(
                f"{self.stores[0].url}: no source knows yet how many shards the cache has",
                do="let cache-teacher go on with one of them until its corpus is prepared",
            )
        store = self.stores[self.inventories.index(self.whole)]
        shards = [
            PlannedRows(
                *record.key,
                record.rows + len(self.whole.failed_rows(shard_label(*record.key))),
                record.tokens,
                None,
            )
            for _, records in read_segments(store, self.whole)
            for record in records or ()
        ]
        plan = Plan(self.whole.identity, tuple(shards))
        return plan, encode_plan(plan)

    def _with_rows(self, plan: Plan) -> Plan:
        """Return the plan with a line for each shard, of the rows that any source has of it."""
        if plan.shards:
            return plan
        rows: dict[tuple[str, int], tuple[int, int]] = {}
        for store, inventory in zip(self.stores, self.inventories, strict=True):
            for _, records in read_segments(store, inventory):
                for record in records or ():
                    found = record.rows + record.rows_quarantined, record.tokens
                    rows[record.key] = max(found, rows.get(record.key, (0, 0)))
        shards = [
            PlannedRows(split, index, *rows.get((split, index), (0, 0)), None)
            for split, count in plan.plan_counts.items()
            for index in range(count)
        ]
        return Plan(plan.identity, tuple(shards), plan.plan_counts)

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

    def settings(self) -> Iterator[tuple[str, bytes]]:
        """Yield stage one's configuration and fitted tau, of the first source that has each."""
        for name in _SETTINGS:
            yield from [(name, s.read(name)) for s in self.stores if s.exists(name)][:1]


def merge_parts(
    target: Store,
    sources: Sequence[Store],
    inventories: Sequence[Inventory],
    *,
    command: str,
    workers: int,
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
        workers: shards copied at one time.
        on_start: called with the number of rows to write.
        on_rows: called with the number of rows written.

    Raises:
        CacheError: the sources hold different texts or shards, or no source has some shard (the
            others have been written, without a manifest), or the target cannot be used.
    """
    text = find_text(target, sources, inventories, workers=workers)
    parts = _Parts(sources, inventories)
    plan, raw = parts.plan()
    found = parts.found()
    differ = [
        " and ".join(sources[c.source].full_url(shard_name(*key)) for c in (one, two))
        for key, candidates in found.items()
        for one, two in combinations(candidates, 2)
        # A row on which one worker's engine fails may have succeeded on another's.
        if (one.rows == two.rows and one.xxh3_128 != two.xxh3_128)
        or (one.made_from and two.made_from and one.made_from != two.made_from)
    ]
    if differ:
        raise CacheError(
            "caches of one identity hold different shards:\n  - " + "\n  - ".join(differ) + "\n",
            do="verify each cache; on one kind of machine every worker writes the same bytes for "
            "a shard",
        )
    reserve_folder(target, plan, raw)
    for name, data in parts.settings():
        target.write(name, data)
    text.copy(workers)

    records = [_BlockReader(store, inventory) for store, inventory in zip(
        sources, inventories, strict=True
    )]  # fmt: skip

    def make(place: int) -> tuple[ShardRecord, bytes] | None:
        item = plan.shards[place]
        for candidate in found.get((item.split, item.index), []):
            record = records[candidate.source].read(item, candidate.xxh3_128)
            part = None if record is None else _read(sources[candidate.source], record, item)
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
        replace(item, rows=those[0].rows, tokens=those[0].tokens) if those else item
        for item, those in zip(plan.shards, best, strict=True)
    ]
    on_start(sum(item.rows for item in wanted))
    _reopen_others(target, wanted)
    impossible = fill(target, wanted, make, on_rows, workers=workers)
    if impossible:
        names = [item.name for item in impossible]
        more = ", ..." if len(names) > 8 else ""
        raise CacheError(
            f"{target.url}: {len(plan.shards) - len(names)} of {len(plan.shards)} shards are "
            f"there; no source has an intact {', '.join(names[:8])}{more}",
            do=f"run cache-teacher with --cache_dir {target.url}, which computes only those, or "
            "merge again with a cache that has them",
        )
    whole = parts.whole.manifest if parts.whole else None
    scheme = plan.identity["scheme"]
    failures = read_quarantine(target)
    counts = dict(whole.corpus_counts) if whole else None
    if counts is not None:
        counts.pop("rows_quarantined", None)
    manifest = finish(
        target,
        plan.shards,
        quarantined={shard: len(rows) for shard, rows in failures.items()},
        identity=plan.identity,
        spec=read_spec(whole.codec if whole else plan.identity["codec"]),
        temperatures=whole.temperatures if whole else scheme["temperatures"],
        tokenizer=parts.tokenizer(),
        corpus_counts=counts,
        more_counts=None if whole else text.counts(),
        corpus_content=whole.corpus_content if whole else "",
        command=command,
    )
    return manifest.total().rows


class _BlockReader:
    """The records of a source with their rows; those of the last block are kept.

    Safe to use from several threads: one reads a block, the others wait for it.
    """

    def __init__(self, store: Store, inventory: Inventory) -> None:
        self._store = store
        self._recorded = inventory.recorded
        self._block: tuple[str, int] | None = None
        self._records: dict[int, list[ShardRecord]] = {}
        self._lock = threading.Lock()

    def read(self, item: PlannedRows, xxh3_128: str) -> ShardRecord | None:
        """Return the record of a shard's file with this checksum."""
        block = item.split, item.index // SEGMENT_SHARDS
        with self._lock:
            if block != self._block:
                first = block[1] * SEGMENT_SHARDS
                name = SegmentName(item.split, first, first + SEGMENT_SHARDS - 1)
                self._records = read_block(self._store, name, self._recorded)
                self._block = block
            of_shard = self._records.get(item.index, [])
        return next((record for record in of_shard if record.xxh3_128 == xxh3_128), None)


def _reopen_others(target: Store, wanted: Sequence[PlannedRows]) -> None:
    """Make shards of an earlier call unrecorded if a source has more of their rows by now."""
    planned = {(item.split, item.index): (item.rows, item.tokens) for item in wanted}
    reopen(
        target,
        [
            record.key
            for _, records in read_segments(target, read_inventory(target))
            for record in records or ()
            if planned.get(record.key) != (record.rows, record.tokens)
        ],
    )


def _read(
    store: Store, record: ShardRecord, item: PlannedRows
) -> tuple[ShardRecord, bytes, bytes | None] | None:
    """Return record, file and list of quarantined rows; None if one of them is damaged."""
    try:
        failed = None
        if record.rows != item.rows:
            failed = store.read(quarantine_name(item.name))
            rows = decode_quarantine(failed, item.name)
            if rows is None or record.rows + len(rows) != item.rows:
                return None
        return record, read_shard(store, record), failed
    except (CacheError, FileNotFoundError):
        return None
