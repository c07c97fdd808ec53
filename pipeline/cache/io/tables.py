"""Shards as Arrow tables: read and checked, decoded, rewritten without decoding a target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache.codec.arrow import Heads, coded_rows
from pipeline.cache.codec.spec import CodedRows
from pipeline.cache.codec.subsample import ALL_ENTRIES, EntryLimit
from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.parquet import parquet_table
from pipeline.cache.io.writer import pack_shard
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.records import ShardRecord
from pipeline.cache.layout.schema import column_names, read_footer, read_spec, table_to_rows
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = [
    "decode_table",
    "encode_table",
    "read_shard",
    "table_from_bytes",
    "tail_mass",
]

_BATCH_ROWS = 256
"""Decoded rows are several times larger than encoded ones; this many are decoded at a time."""


def read_shard(store: Store, record: ShardRecord) -> bytes:
    """Return a shard's file, compared with its record.

    Raises:
        CacheError: missing, or of another size or checksum; `found` is the bare reason.
    """
    try:
        data = store.read(record.path, large=True)
    except FileNotFoundError:
        raise CacheError("missing") from None
    if len(data) != record.bytes:
        raise CacheError(f"{len(data)} bytes, not {record.bytes}")
    found = checksum(data)
    if found != record.xxh3_128:
        raise CacheError(f"checksum {found[:12]}..., not {record.xxh3_128[:12]}...")
    return data


def table_from_bytes(data: bytes, identity_digest: str | None) -> pa.Table:
    """Return the columns of a shard's file.

    Raises:
        CacheError: not Parquet, not a shard, or of another identity.
    """
    try:
        about = read_footer(pq.read_schema(pa.BufferReader(data)).metadata)
        spec = read_spec(about["codec"])  # another codec has other columns
        table = parquet_table(data, column_names(spec))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise CacheError(f"not readable as Parquet ({error})") from None
    digest = about.get("identity_digest")
    if identity_digest is not None and digest != identity_digest:
        raise CacheError("it belongs to a cache of another identity")
    return table


def decode_table(table: pa.Table) -> Iterator[CachedSequence]:
    """Yield the rows of a shard, decoded by its footer's codec, a few hundred at a time.

    Raises:
        CacheError: a row that no writer can have written.
    """
    about = read_footer(table.schema.metadata)
    spec = read_spec(about["codec"])
    for start in range(0, table.num_rows, _BATCH_ROWS):
        yield from table_to_rows(table.slice(start, _BATCH_ROWS), spec, about["temperatures"])


def tail_mass(table: pa.Table) -> NDArray[np.float64]:
    """Return 1 less the mass of the always-kept entries, for each supervised position of a shard.

    Raises:
        CacheError: damaged.
    """
    about = read_footer(table.schema.metadata)
    spec = read_spec(about["codec"])
    return 1.0 - coded_rows(table, spec, tuple(about["temperatures"]))[1].kept_mass_N(spec)


def encode_table(
    tables: Sequence[pa.Table],
    *,
    split: str,
    index: int,
    identity_digest: str,
    limit: EntryLimit = ALL_ENTRIES,
    source_xxh3_128: str = "",
    rows_quarantined: int = 0,
) -> tuple[ShardRecord, bytes]:
    """Return a shard with the rows of some tables, under another name and identity.

    The codes are copied: decoding and encoding a target would change it (the largest entry of a
    top-k is a remainder, not a quantised value). Only the order of the ids is computed for the new
    shard. The bytes equal those of `encode_shard` for these rows; a test compares the two.

    Args:
        tables: of one codec and temperature grid, each with its shard's metadata.
        split: of the new shard.
        index: of the new shard.
        identity_digest: of the new cache.
        limit: which entries stay.
        source_xxh3_128: as `encode_shard` takes it.
        rows_quarantined: as `encode_shard` takes it.
    """
    about = read_footer(tables[0].schema.metadata)
    spec, grid = read_spec(about["codec"]), tuple(float(value) for value in about["temperatures"])
    heads, coded = zip(*(coded_rows(table, spec, grid) for table in tables), strict=True)
    joined, rows = Heads.join(heads), CodedRows.join(coded)
    rows = limit.of_coded(rows, joined.noise_N, spec, grid)
    return pack_shard(
        joined,
        rows,
        limit.of_spec(spec),
        split=split,
        index=index,
        temperatures=grid,
        identity_digest=identity_digest,
        source_xxh3_128=source_xxh3_128,
        rows_quarantined=rows_quarantined,
    )
