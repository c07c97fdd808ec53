"""Compare shards with their records: sizes, checksums, or every decoded row; in processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pipeline.cache.io.tables import decode_table, read_shard, table_from_bytes
from pipeline.cache.layout.records import ShardRecord, short_ids
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.storage.parallel import in_processes, in_threads

__all__ = ["Checked", "check_shards"]

_AT_ONCE = 16
"""Shards of one task: a process is asked rarely, and an interrupted run has little to do again."""
_FEW = 32
"""Up to so many shards threads are faster than starting processes, which takes two seconds."""


@dataclass(frozen=True, slots=True)
class Checked:
    """Some shards that have been compared, and what is wrong with which."""

    records: tuple[ShardRecord, ...]
    """Without their rows."""
    reasons: tuple[tuple[int, str], ...]
    """By place among the records."""


def check_shards(
    store: Store,
    records: Iterable[ShardRecord],
    *,
    check: str,
    identity_digest: str | None,
    workers: int,
    expected: int,
) -> Iterator[Checked]:
    """Yield what comparing the shards' files with their records finds, in the records' order.

    Args:
        store: the cache's root.
        records: with their rows, where the rows are decoded.
        check: `checksum` or `decode`.
        identity_digest: that the shards carry; None where it is not known or differs.
        workers: processes; threads for few shards, and where the store is this process's memory.
        expected: about how many records there are.
    """
    compare = partial(_check, store.url, check=check, identity_digest=identity_digest)
    tasks = _tasks(records, with_rows=check == "decode")
    if workers <= 1 or expected <= _FEW or store.url.startswith("memory:"):
        yield from in_threads(compare, tasks, workers)
    else:
        yield from in_processes(compare, tasks, workers)


def _tasks(records: Iterable[ShardRecord], *, with_rows: bool) -> Iterator[tuple[ShardRecord, ...]]:
    task: list[ShardRecord] = []
    for record in records:
        bare = replace(record, row_tokens=(), row_loss_tokens=(), row_ids=b"")
        task.append(record if with_rows else bare)
        if len(task) == _AT_ONCE:
            yield tuple(task)
            task = []
    if task:
        yield tuple(task)


def _check(
    url: str, records: Sequence[ShardRecord], *, check: str, identity_digest: str | None
) -> Checked:
    store = Store(url)
    reasons: list[tuple[int, str]] = []
    bare: list[ShardRecord] = []
    for place, record in enumerate(records):
        try:
            data = read_shard(store, record)
            if check == "decode":
                _decode(data, record, identity_digest)
        except CacheError as error:
            reasons.append((place, error.found))
        bare.append(replace(record, row_tokens=(), row_loss_tokens=(), row_ids=b""))
    return Checked(tuple(bare), tuple(reasons))


def _decode(data: bytes, record: ShardRecord, identity_digest: str | None) -> None:
    """Decode every row and compare what they sum up to.

    Raises:
        CacheError: the rows are damaged, or not those of the record.
    """
    names: list[str] = []
    tokens: list[int] = []
    loss_tokens: list[int] = []
    entries = 0
    for row in decode_table(table_from_bytes(data, identity_digest)):
        names.append(row.sample_id)
        tokens.append(int(row.input_ids_L.size))
        loss_tokens.append(row.targets.num_positions)
        entries += int(row.targets.token_ids_E.size)
    found = (len(names), sum(tokens), sum(loss_tokens), entries)
    wanted = (record.rows, record.tokens, record.loss_tokens, record.entries)
    words = "rows, tokens, supervised tokens, entries"
    if found != wanted:
        raise CacheError(f"holds {found} {words}, its record says {wanted}")
    if tokens != list(record.row_tokens) or loss_tokens != list(record.row_loss_tokens):
        raise CacheError("its rows have other lengths than its record says")
    if short_ids(names) != record.row_ids:
        raise CacheError("its rows have other sample ids than its record says")
