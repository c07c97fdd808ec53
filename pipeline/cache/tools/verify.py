"""Verify a cache: check every file against the others, and list the damaged ones by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.io.tables import decode_table, read_table, short_ids
from pipeline.cache.layout.inventory import Inventory, PlannedRows, read_inventory
from pipeline.cache.layout.manifest import (
    PLAN,
    ROWS,
    ShardRecord,
    checksum,
    decode_record,
    read_rows_index,
    record_name,
    tokenizer_name,
)
from pipeline.cache.layout.quarantine import quarantine_name
from pipeline.cache.tools.coverage import (
    Finding,
    failed_findings,
    plan_findings,
    plan_reason,
    response_findings,
    stray_findings,
)
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.storage.parallel import in_threads

__all__ = ["Finding", "verify_cache"]


@dataclass(frozen=True, slots=True)
class _Seen:
    """The result of reading one shard."""

    findings: tuple[Finding, ...]
    ids_R: NDArray[np.bytes_]
    """16 bytes of each sample's id."""


def verify_cache(
    store: Store,
    *,
    quick: bool = False,
    workers: int = 1,
    on_start: Callable[[int], None] = lambda rows: None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> list[Finding]:
    """Return every damaged file of a cache; an empty list means that the cache is intact.

    A cache without a readable manifest is checked against its plan and its shards' records, and
    the manifest is one of the findings. Memory: the shards being read, and 16 bytes a row.

    Args:
        store: the cache's root.
        quick: compare only the sizes of shards; small files are still read.
        workers: shards read at one time.
        on_start: called with the number of rows to check.
        on_rows: called with the number of rows checked.

    Raises:
        CacheError: there is no cache, or one of a newer format.
        StoreError: the store cannot be reached.
    """
    inventory = read_inventory(store)
    findings = [Finding(name, reason) for name, reason in inventory.damaged]
    rows_index = _rows_index(store, inventory, findings)
    findings += _tokenizer(store, inventory)
    findings += plan_findings(store, inventory)
    findings += failed_findings(inventory)
    findings += stray_findings(store, inventory)
    findings += response_findings(store)
    on_start(sum(record.rows for record in inventory.records))
    starts = np.cumsum([0] + [record.rows for record in inventory.records])
    planned = {(item.split, item.index): item for item in inventory.planned}

    def check(position: int) -> _Seen:
        record = inventory.records[position]
        wanted = None
        if rows_index is not None:
            wanted = rows_index[starts[position] : starts[position + 1]]
        plan = planned.get((record.split, record.index))
        return _check_shard(store, record, wanted, plan, inventory, quick)

    seen: list[_Seen] = []
    for position, one in enumerate(in_threads(check, range(len(inventory.records)), workers)):
        findings += one.findings
        seen.append(one)
        on_rows(inventory.records[position].rows)
    findings += _repeated(inventory, seen)
    return _without_twins(findings)


def _rows_index(
    store: Store, inventory: Inventory, findings: list[Finding]
) -> NDArray[np.int32] | None:
    if inventory.manifest is None:
        return None
    try:
        return read_rows_index(store, inventory.manifest)
    except CacheError as error:
        findings.append(Finding(ROWS, _reason(error, store, ROWS)))
        return None


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


def _check_shard(
    store: Store,
    listed: ShardRecord,
    rows_R2: NDArray[np.int32] | None,
    plan: PlannedRows | None,
    inventory: Inventory,
    quick: bool,
) -> _Seen:
    key = (listed.split, listed.index)
    findings: list[Finding] = []
    reason = _record_reason(store, listed, rows_R2, inventory)
    if reason:
        findings.append(Finding(record_name(*key), reason, key))
    if plan is not None:
        text = plan_reason(plan, listed, inventory)
        findings += [Finding(PLAN, text)] if text else []
    ids = np.zeros(0, "S16")
    if quick:
        size = store.size(listed.path)
        if size != listed.bytes:
            text = "missing" if size is None else f"{size} bytes, not {listed.bytes}"
            findings.append(Finding(listed.path, text, key))
        return _Seen(tuple(findings), ids)
    try:
        ids, samples_sha256 = _read_rows(store, listed, rows_R2, inventory)
    except CacheError as error:
        findings.append(Finding(listed.path, error.found, key))
        return _Seen(tuple(findings), ids)
    # The digest is over all planned rows; if a shard lacks some, only their number is compared.
    lacking = plan is not None and plan.rows != listed.rows
    if plan is not None and not lacking and plan.samples_sha256 not in (None, samples_sha256):
        findings.append(Finding(PLAN, f"plans other samples than {listed.path} holds"))
    failed = inventory.failed_rows(f"{listed.split}-{listed.index:05d}")
    both = np.isin(short_ids([row.sample_id for row in failed]), ids).sum() if failed else 0
    if both:
        name = quarantine_name(f"{listed.split}-{listed.index:05d}")
        findings.append(Finding(name, f"{both} of its rows are in {listed.path} nevertheless", key))
    return _Seen(tuple(findings), ids)


def _record_reason(
    store: Store, listed: ShardRecord, rows_R2: NDArray[np.int32] | None, inventory: Inventory
) -> str:
    """Return what is wrong with a shard's record, on which a later stage one would rely."""
    if inventory.manifest is None:
        return ""  # the shards are checked against the records, which are intact
    try:
        record = decode_record(store.read(record_name(listed.split, listed.index)))
    except FileNotFoundError:
        return "shard record missing"
    if record is None:
        return "shard record damaged (its checksum does not match)"
    if record.to_json(with_rows=False) != listed.to_json(with_rows=False):
        return "shard record differs from the manifest"
    if rows_R2 is not None and (
        list(record.row_tokens) != rows_R2[:, 0].tolist()
        or list(record.row_loss_tokens) != rows_R2[:, 1].tolist()
    ):
        return f"shard record differs from {ROWS}"
    return ""


def _read_rows(
    store: Store, listed: ShardRecord, rows_R2: NDArray[np.int32] | None, inventory: Inventory
) -> tuple[NDArray[np.bytes_], str]:
    """Decode every row of a shard; return the ids as 16 bytes each, and the digest of them all."""
    table = read_table(store, listed, inventory.identity_digest)
    names: list[str] = []
    tokens: list[int] = []
    loss_tokens: list[int] = []
    entries = 0
    for row in decode_table(table):
        names.append(row.sample_id)
        tokens.append(int(row.input_ids_L.size))
        loss_tokens.append(row.targets.num_positions)
        entries += int(row.targets.token_ids_E.size)
    found = (len(names), sum(tokens), sum(loss_tokens), entries)
    wanted = (listed.rows, listed.tokens, listed.loss_tokens, listed.entries)
    words = "rows, tokens, supervised tokens, entries"
    if found != wanted:
        raise CacheError(f"holds {found} {words}, its record says {wanted}")
    if rows_R2 is not None and (
        tokens != rows_R2[:, 0].tolist() or loss_tokens != rows_R2[:, 1].tolist()
    ):
        raise CacheError(f"its rows have other lengths than {ROWS} says")
    return short_ids(names), fingerprint(names)


def _repeated(inventory: Inventory, seen: Sequence[_Seen]) -> Iterator[Finding]:
    """Check that a sample occurs once, except for repeats that a merge declares."""
    ids = [one.ids_R for one in seen]
    if not ids:
        return
    every = np.concatenate(ids)
    owner = np.repeat(np.arange(len(ids)), [part.size for part in ids])
    heldout = np.array([record.split != "train" for record in inventory.records])[owner]
    order = np.argsort(every, kind="stable")
    every, owner, heldout = every[order], owner[order], heldout[order]
    again = np.flatnonzero(every[1:] == every[:-1]) + 1
    both = again[heldout[again] != heldout[again - 1]]
    allowed = int((inventory.identity or {}).get("derived", {}).get("repeated_samples", 0))
    for position in np.unique(owner[both]).tolist():
        listed = inventory.records[position]
        yield Finding(
            listed.path,
            f"{int((owner[both] == position).sum())} of its samples are in the other split too",
            (listed.split, listed.index),
        )
    if again.size > allowed and not both.size:
        for position in np.unique(owner[again]).tolist():
            listed = inventory.records[position]
            yield Finding(
                listed.path,
                f"{int((owner[again] == position).sum())} of its samples are in the cache twice",
                (listed.split, listed.index),
            )


def _without_twins(findings: Iterable[Finding]) -> list[Finding]:
    """Keep the first finding of each file."""
    first: dict[str, Finding] = {}
    for finding in findings:
        first.setdefault(finding.name, finding)
    return list(first.values())


def _reason(error: CacheError, store: Store, name: str) -> str:
    return error.found.removeprefix(f"{store.full_url(name)}: ")
