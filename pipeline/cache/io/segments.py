"""The segments of a complete cache: whole, or of large ones only the columns that are needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.manifest import Manifest, Segment
from pipeline.cache.layout.names import SEGMENT_SHARDS, repair_advice, shard_name
from pipeline.cache.layout.records import LENGTHS, LIGHT, SEGMENT_SCHEMA, ShardRecord, records_of
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = ["RecordReader", "iter_records", "segment_columns"]

_WHOLE_BYTES = 32 << 20
"""A larger segment is read column by column: at a billion rows the sample ids are two thirds of it,
16 MB a thousand rows of a thousand shards, and training needs none of them."""
_SUMS = ("rows", "tokens", "loss_tokens", "entries", "bytes")


def segment_columns(
    store: Store, segment: Segment, columns: Sequence[str], *, whole_bytes: int = _WHOLE_BYTES
) -> pa.Table:
    """Return columns of a segment, checked: as a file, or by page checksums and the sums.

    Args:
        store: the cache's root.
        segment: the manifest's entry.
        columns: their names.
        whole_bytes: a segment up to this size is read as one file, by one request.

    Raises:
        CacheError: the segment is missing or damaged, or is not that of the manifest.
        StoreError: the store fails.
    """
    wanted = list(dict.fromkeys([*LIGHT, *columns]))
    try:
        if segment.segment_bytes <= whole_bytes:
            raw = store.read(segment.path)
            if checksum(raw) != segment.xxh3_128:
                raise _damaged(store, segment, "its checksum does not match")
            # The calling thread alone, as in `parquet_table`.
            file = pq.ParquetFile(pa.BufferReader(raw), pre_buffer=False)
            table = file.read(wanted, use_threads=False)
        else:
            with store.open(segment.path) as opened:
                file = pq.ParquetFile(opened, page_checksum_verification=True, pre_buffer=True)
                table = file.read(wanted, use_threads=False)
    except FileNotFoundError:
        raise _damaged(store, segment, "missing") from None
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise _damaged(store, segment, f"not readable as Parquet ({error})") from None
    kinds = [(name, SEGMENT_SCHEMA.field(name).type) for name in wanted]
    if [(item.name, item.type) for item in table.schema] != kinds:
        raise _damaged(store, segment, "its columns are not those of records")
    _compare(store, segment, table)
    return table


def iter_records(
    store: Store,
    manifest: Manifest,
    split: str | None = None,
    columns: Sequence[str] = tuple(SEGMENT_SCHEMA.names),
) -> Iterator[ShardRecord]:
    """Yield the records of a split, or of the cache, in order; one segment is in memory.

    Args:
        store: the cache's root.
        manifest: of the cache.
        split: only this one.
        columns: what the records hold besides the columns of one value a shard.

    Raises:
        CacheError: a segment is missing or damaged.
        StoreError: the store fails.
    """
    for segment in manifest.segments if split is None else manifest.of_split(split):
        yield from records_of(segment_columns(store, segment, columns))


class RecordReader:
    """Records of a complete cache with their rows, at any place; the last segment is kept.

    Safe to use from several threads.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        """Read nothing yet."""
        self._store = store
        self._segments = {
            (segment.split, segment.first // SEGMENT_SHARDS): segment
            for segment in manifest.segments
        }
        self._last: tuple[Segment, list[ShardRecord]] | None = None
        self._lock = threading.Lock()

    def read(self, split: str, index: int) -> ShardRecord:
        """Return the record of a shard.

        Raises:
            CacheError: its segment is missing or damaged.
            StoreError: the store fails.
        """
        segment = self._segments[split, index // SEGMENT_SHARDS]
        with self._lock:
            if self._last is None or self._last[0] is not segment:
                table = segment_columns(self._store, segment, SEGMENT_SCHEMA.names)
                self._last = segment, list(records_of(table))
            return self._last[1][index - segment.first]


def _compare(store: Store, segment: Segment, table: pa.Table) -> None:
    """Compare what was read with the manifest, which has its own checksum.

    Raises:
        CacheError: it differs.
    """
    if set(table.column("split").to_pylist()) != {segment.split} or table.column(
        "index"
    ).to_pylist() != list(segment.name.shards):
        raise _damaged(store, segment, "it holds other shards than the manifest says")
    # A path is written to by whoever copies the cache.
    paths = [shard_name(segment.split, index) for index in segment.name.shards]
    if "path" in table.column_names and table.column("path").to_pylist() != paths:
        raise _damaged(store, segment, "it names files that are no shards of it")
    for name in _SUMS:
        found = pc.sum(table.column(name)).as_py()
        if found != getattr(segment, name):
            raise _damaged(
                store, segment, f"{found} {name}, the manifest says {getattr(segment, name)}"
            )
    for name, total in zip(LENGTHS, ("tokens", "loss_tokens"), strict=True):
        if name in table.column_names:
            lists = table.column(name)
            lengths = pc.sum(pc.list_flatten(lists)).as_py() or 0
            rows = pc.list_value_length(lists).to_pylist()
            if lengths != getattr(segment, total) or rows != table.column("rows").to_pylist():
                raise _damaged(store, segment, f"its {name} are not those of its records")


def _damaged(store: Store, segment: Segment, reason: str) -> CacheError:
    return CacheError(
        f"{store.full_url(segment.path)}: records missing or damaged: {reason}",
        do=repair_advice(store.url),
    )
