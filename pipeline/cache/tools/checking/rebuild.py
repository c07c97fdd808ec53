"""Records again from the shards they describe, where a file of records is damaged."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from pipeline.cache.io.tables import encode_table, table_from_bytes
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.names import SegmentName, shard_name
from pipeline.cache.layout.records import ShardRecord, encode_segment
from pipeline.cache.layout.schema import read_footer
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.storage.parallel import in_threads

__all__ = ["rebuild_segment", "record_of"]


def record_of(
    data: bytes, split: str, index: int, identity_digest: str | None
) -> ShardRecord | None:
    """Return the record of a shard from its bytes alone; None where they are damaged.

    No other file vouches for them here. They are right if what they decode to, encoded again, gives
    the same bytes: page checksums do not cover a Parquet file's own metadata.

    Args:
        data: the shard's file.
        split: where it belongs.
        index: where it belongs.
        identity_digest: that it must carry; None where that is not known.
    """
    try:
        table = table_from_bytes(data, identity_digest)
        own = read_footer(table.schema.metadata)
        record, again = encode_table(
            [table],
            split=split,
            index=index,
            identity_digest=str(own["identity_digest"]),
            source_xxh3_128=str(own.get("source_xxh3_128", "")),
            rows_quarantined=int(own.get("rows_quarantined", 0)),
        )
    except (CacheError, pa.ArrowException, KeyError, ValueError, IndexError):
        return None
    return record if again == data else None


def rebuild_segment(
    store: Store, name: SegmentName, identity_digest: str | None, *, workers: int = 1
) -> tuple[str | None, tuple[tuple[str, int], ...]]:
    """Write a damaged file of records again; return its checksum, and the shards to be made again.

    Where a shard is damaged too, the records of the others are written as smaller files and there
    is no checksum.

    Args:
        store: the cache's root.
        name: which records.
        identity_digest: that the shards carry; None where that is not known.
        workers: shards read at one time.
    """

    def read(index: int) -> ShardRecord | None:
        try:
            data = store.read(shard_name(name.split, index))
        except FileNotFoundError:
            return None
        return record_of(data, name.split, index, identity_digest)

    found = dict(zip(name.shards, in_threads(read, name.shards, workers), strict=True))
    missing = tuple((name.split, index) for index, record in found.items() if record is None)
    raw = b""
    for run in _runs(found):
        piece = SegmentName(name.split, run[0].index, run[-1].index)
        raw = encode_segment(run)
        store.write(piece.path, raw)
    if missing:
        store.delete(name.path)
    return (None if missing else checksum(raw)), missing


def _runs(found: dict[int, ShardRecord | None]) -> Iterator[list[ShardRecord]]:
    run: list[ShardRecord] = []
    for record in found.values():
        if record is not None:
            run.append(record)
        elif run:
            yield run
            run = []
    if run:
        yield run
