"""Verify a cache: check every file against the others, and list the damaged ones by name.

What is compared of the shards is chosen. `size` reads the small files and the records, and lists
the shards. `checksum`, the default, reads every byte once: it finds whatever a disk, a copy or a
person has changed, because the writer's own words on each file are in the records and the manifest.
`decode` also decodes every row: it finds what a wrong writer would have written, and takes the time
of training's data path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from pipeline.cache.io.segments import iter_records
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.inventory import (
    Inventory,
    PlannedRows,
    read_inventory,
    read_segments,
)
from pipeline.cache.layout.manifest import Manifest
from pipeline.cache.layout.names import (
    CHECKS,
    MANIFEST,
    PLAN,
    SPLITS,
    SegmentName,
    shard_label,
    shard_name,
    tokenizer_name,
)
from pipeline.cache.layout.quarantine import quarantine_name
from pipeline.cache.layout.records import ShardRecord
from pipeline.cache.tools.checking.check_files import check_shards
from pipeline.cache.tools.checking.coverage import (
    Finding,
    failed_findings,
    plan_findings,
    plan_reason,
    response_findings,
    stray_findings,
)
from pipeline.cache.tools.checking.rebuild import record_of
from pipeline.cache.tools.checking.sample_ids import SampleIds
from pipeline.cache.tools.checking.verify_state import VerifyState
from pipeline.config import fingerprint
from pipeline.storage import Store

__all__ = ["Finding", "find_damaged", "verify_cache"]


def verify_cache(
    store: Store,
    *,
    check: str = "checksum",
    workers: int = 1,
    on_start: Callable[[int], None] = lambda rows: None,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_resume: Callable[[int], None] = lambda shards: None,
) -> list[Finding]:
    """Return every damaged file of a cache; an empty list means that the cache is intact.

    A cache without a readable manifest is checked against its plan and its shards' records, and
    the manifest is one of the findings. An interrupted run over a complete cache is continued.
    Memory: the shards being read, two segments of records, and sample ids up to 84 MB (more are
    kept on the local disk).

    Args:
        store: the cache's root.
        check: one of `CHECKS`.
        workers: shards read at one time.
        on_start: called with the number of rows to check.
        on_rows: called with the number of rows checked.
        on_resume: called with the number of shards that an interrupted run has checked.

    Raises:
        CacheError: there is no cache, or one of a newer format.
        StoreError: the store cannot be reached.
    """
    assert check in CHECKS, check
    inventory = read_inventory(store)
    records = _Records(store, inventory, check)
    findings = [Finding(name, reason) for name, reason in inventory.damaged]
    findings += _tokenizer(store, inventory)
    findings += plan_findings(store, inventory)
    findings += stray_findings(store, inventory)
    findings += response_findings(store)
    on_start(_rows(store, inventory))
    state = None
    if inventory.manifest is not None and check != "size":
        state = VerifyState(store.url, check, checksum(store.read(MANIFEST)))
        if state.intact:
            on_resume(len(state.intact))
    for checked in check_shards(
        store,
        records.to_read(state.intact if state else frozenset(), on_rows),
        check=check,
        identity_digest=inventory.shard_identity,
        workers=workers,
        expected=sum(inventory.shard_counts.values()),
    ):
        wrong = dict(checked.reasons)
        for place, reason in wrong.items():
            record = checked.records[place]
            findings.append(Finding(record.path, reason, record.key))
        if state is not None:
            right = (r.key for place, r in enumerate(checked.records) if place not in wrong)
            state.add(right)
        on_rows(sum(record.rows for record in checked.records))
    findings += records.findings
    findings += failed_findings(inventory, records.lacking)
    findings += records.repeated()
    if state is not None:
        state.end()
    return _without_twins(findings)


def find_damaged(
    store: Store, manifest: Manifest, workers: int = 1, check: str = "checksum"
) -> list[Finding]:
    """Return the shards of a complete cache that are not as recorded; each has its `shard`.

    Args:
        store: the cache's root.
        manifest: of the cache.
        workers: shards read at one time.
        check: one of `CHECKS`.

    Raises:
        CacheError: a segment of records is missing or damaged.
        StoreError: the store cannot be reached.
    """
    assert check in CHECKS, check
    sizes = {split: store.sizes(f"data/{split}") for split in manifest.shard_counts}
    findings: list[Finding] = []

    def of_right_size() -> Iterator[ShardRecord]:
        for record in iter_records(store, manifest):
            reason = _size_reason(record, sizes)
            if reason:
                findings.append(Finding(record.path, reason, record.key))
            elif check != "size":
                yield record

    for checked in check_shards(
        store,
        of_right_size(),
        check=check,
        identity_digest=manifest.shard_identity,
        workers=workers,
        expected=manifest.total().shards,
    ):
        for place, reason in checked.reasons:
            record = checked.records[place]
            findings.append(Finding(record.path, reason, record.key))
    return findings


class _Records:
    """One pass over all records: what they say, and which shards are left to be read."""

    def __init__(self, store: Store, inventory: Inventory, check: str) -> None:
        self._store = store
        self._inventory = inventory
        self._check = check
        self._planned = {(item.split, item.index): item for item in inventory.planned}
        self._sizes = {
            split: store.sizes(f"data/{split}")
            for split in SPLITS
            if inventory.shard_counts.get(split)
        }
        self._ids = SampleIds()
        counts = inventory.shard_counts
        self._starts = {split: counts.get("train", 0) * (split != "train") for split in SPLITS}
        self.findings: list[Finding] = []
        self.lacking: dict[tuple[str, int], int] = {}

    def to_read(
        self, intact: frozenset[tuple[str, int]], on_rows: Callable[[int], None]
    ) -> Iterator[ShardRecord]:
        """Yield the records whose shards are to be read; the others' rows are told at once."""
        seen: set[tuple[str, int]] = set()
        counts = self._inventory.shard_counts
        for name, records in read_segments(self._store, self._inventory):
            if records is None:
                self.findings.append(Finding(name.path, "records missing or damaged"))
                self.findings += self._by_itself(name)
                continue
            for record in records:
                if record.key in seen or record.index >= counts.get(record.split, 0):
                    continue  # a file that is being folded, or a stray one, which is reported
                seen.add(record.key)
                self.findings += self._by_record(record)
                reason = _size_reason(record, self._sizes)
                if reason:
                    self.findings.append(Finding(record.path, reason, record.key))
                elif self._check != "size" and record.key not in intact:
                    yield record
                    continue
                on_rows(record.rows)

    def _by_itself(self, name: SegmentName) -> Iterator[Finding]:
        """Yield what is wrong with shards whose records are damaged: each is its own witness."""
        for index in name.shards:
            path, key = shard_name(name.split, index), (name.split, index)
            if index >= self._inventory.shard_counts.get(name.split, 0):
                continue
            if path.rsplit("/", 1)[-1] not in self._sizes[name.split]:
                yield Finding(path, "missing", key)
            elif self._check != "size":
                identity = self._inventory.shard_identity
                if record_of(self._store.read(path), *key, identity) is None:
                    yield Finding(path, "damaged; its record is lost too", key)

    def repeated(self) -> Iterator[Finding]:
        """Yield the shards with samples that occur again, but for repeats that a merge declares."""
        found = self._ids.repeats(self._starts["heldout"])
        identity = self._inventory.identity or {}
        allowed = int(identity.get("derived", {}).get("repeated_samples", 0))
        across = bool(found.across)
        for place, number in sorted((found.across if across else found.by_owner).items()):
            if not across and found.rows <= allowed:
                return
            where = "the other split" if across else "the cache"
            again = "too" if across else "twice"
            key = self._key(place)
            yield Finding(shard_name(*key), f"{number} of its samples are in {where} {again}", key)

    def _key(self, place: int) -> tuple[str, int]:
        split = "train" if place < self._starts["heldout"] else "heldout"
        return split, place - self._starts[split]

    def _by_record(self, record: ShardRecord) -> Iterator[Finding]:
        """Yield what is wrong by a record alone."""
        self._ids.add(record.row_ids, self._starts[record.split] + record.index)
        if record.rows_quarantined:
            self.lacking[record.key] = record.rows_quarantined
        plan = self._planned.get(record.key)
        if plan is not None:
            yield from self._by_plan(record, plan)
        name = shard_label(*record.key)
        failed = self._inventory.failed_rows(name)
        if failed:
            ids = set(record.sample_ids())
            both = sum(row.sample_id in ids for row in failed)
            if both:
                text = f"{both} of its rows are in {record.path} nevertheless"
                yield Finding(quarantine_name(name), text, record.key)

    def _by_plan(self, record: ShardRecord, plan: PlannedRows) -> Iterator[Finding]:
        text = plan_reason(plan, record, self._inventory)
        if text:
            yield Finding(PLAN, text)
        if record.rows < plan.rows:
            self.lacking[record.key] = plan.rows - record.rows
        # The digest is over all planned rows; if a shard lacks some, only their number is compared.
        elif plan.samples_sha256 not in (None, fingerprint(record.sample_ids())):
            yield Finding(PLAN, f"plans other samples than {record.path} holds")


def _size_reason(record: ShardRecord, sizes: Mapping[str, Mapping[str, int]]) -> str:
    size = sizes.get(record.split, {}).get(record.path.rsplit("/", 1)[-1])
    if size == record.bytes:
        return ""
    return "missing" if size is None else f"{size} bytes, not {record.bytes}"


def _rows(store: Store, inventory: Inventory) -> int:
    """Return the rows to check: those planned, or recorded where a plan has numbers of shards."""
    if inventory.manifest is not None:
        return inventory.manifest.total().rows
    if inventory.planned:
        return sum(item.rows for item in inventory.planned)
    counts = inventory.shard_counts
    rows = {
        record.key: record.rows  # two files may hold it
        for _, records in read_segments(store, inventory)
        for record in records or ()
        if record.index < counts.get(record.split, 0)
    }
    return sum(rows.values())


def _tokenizer(store: Store, inventory: Inventory) -> Iterator[Finding]:
    for file, wanted in inventory.manifest.tokenizer_xxh3_128.items() if inventory.manifest else ():
        try:
            found = checksum(store.read(tokenizer_name(file)))
        except FileNotFoundError:
            yield Finding(tokenizer_name(file), "missing")
            continue
        if found != wanted:
            reason = f"checksum {found[:12]}..., not {wanted[:12]}..."
            yield Finding(tokenizer_name(file), reason)


def _without_twins(findings: Iterable[Finding]) -> list[Finding]:
    """Keep the first finding of each file."""
    first: dict[str, Finding] = {}
    for finding in findings:
        first.setdefault(finding.name, finding)
    return list(first.values())
