"""Records of shards, and the segments that hold them: Parquet, one row for each shard."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache.layout.embedded_checksum import (
    CHECKSUM_PLACE,
    checksum,
    has_valid_checksum,
    with_checksum,
)
from pipeline.cache.layout.names import SegmentName, shard_name

__all__ = [
    "LENGTHS",
    "LIGHT",
    "SEGMENT_SCHEMA",
    "ShardRecord",
    "decode_segment",
    "encode_record",
    "encode_segment",
    "names_of",
    "records_of",
    "short_ids",
]

_CHECKSUM_KEY = "distill_checksum"
_ID_BYTES = 16
_Bytes = bytes  # a record has a field of that name


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """The record of one committed shard; nothing in it depends on who wrote it or when."""

    split: str
    index: int
    path: str
    """Relative to the cache, `data/<split>/<index>.parquet`."""
    rows: int
    tokens: int
    loss_tokens: int
    entries: int
    bytes: int
    xxh3_128: str
    kept_mass: float
    """Mean over supervised positions of the mass in the stored entries at temperature 1."""
    entropy: float
    """Mean entropy at temperature 1, nats."""
    source_xxh3_128: str = ""
    """Checksum of the prepared text that the rows come from; empty where it is not known."""
    rows_quarantined: int = 0
    """Rows that the shard goes without, because the teacher fails on them."""
    row_tokens: Sequence[int] = field(default=(), hash=False, repr=False)
    """Tokens of each row; kept as int32, eight times smaller than a tuple of integers."""
    row_loss_tokens: Sequence[int] = field(default=(), hash=False, repr=False)
    row_ids: _Bytes = field(default=b"", hash=False, repr=False)
    """The rows' sample ids, 16 bytes each."""

    def __post_init__(self) -> None:
        """Pack the per-row numbers."""
        object.__setattr__(self, "row_tokens", _packed(self.row_tokens))
        object.__setattr__(self, "row_loss_tokens", _packed(self.row_loss_tokens))

    @property
    def key(self) -> tuple[str, int]:
        """Split and index."""
        return self.split, self.index

    def sample_ids(self) -> list[str]:
        """Return the rows' sample ids, 32 hexadecimal digits each."""
        return names_of(self.row_ids)

    def moved(self, split: str, index: int) -> ShardRecord:
        """Return the record of the same file in another place."""
        return replace(self, split=split, index=index, path=shard_name(split, index))


def _packed(numbers: Sequence[int] | NDArray[np.int32]) -> array[int]:
    packed = array("i")
    if isinstance(numbers, np.ndarray):
        packed.frombytes(np.ascontiguousarray(numbers, np.int32).tobytes())
    else:
        packed.extend(numbers)
    return packed


_NUMBERS = [(name, pa.int64()) for name in ("tokens", "loss_tokens", "entries", "bytes")]
SEGMENT_SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in [
            ("split", pa.string()),
            ("index", pa.int32()),
            ("path", pa.string()),
            ("rows", pa.int32()),
            *_NUMBERS,
            ("xxh3_128", pa.string()),
            ("kept_mass", pa.float64()),
            ("entropy", pa.float64()),
            ("source_xxh3_128", pa.string()),
            ("rows_quarantined", pa.int32()),
            # The large columns last: who needs none of them reads the file's first pages alone.
            ("row_tokens", pa.list_(pa.int32())),
            ("row_loss_tokens", pa.list_(pa.int32())),
            ("row_ids", pa.binary()),
        ]
    ]
)
LENGTHS = ("row_tokens", "row_loss_tokens")
LIGHT = tuple(name for name in SEGMENT_SCHEMA.names if not name.startswith("row_"))
"""The columns that have one value for each shard."""


def encode_segment(records: Sequence[ShardRecord]) -> bytes:
    """Return the file of some records, by ascending index; the same records give the same bytes."""
    columns = [
        pa.array([getattr(record, item.name) for record in records], item.type)
        if item.name not in LENGTHS
        else _lists([getattr(record, item.name) for record in records])
        for item in SEGMENT_SCHEMA
    ]
    table = pa.Table.from_arrays(columns, schema=SEGMENT_SCHEMA)
    sink = pa.BufferOutputStream()
    # Without Arrow's own schema the metadata, and so the checksum's place, is there once.
    with pq.ParquetWriter(
        sink,
        SEGMENT_SCHEMA,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,
    ) as file:
        # One group of rows, so that the columns of one value a shard lie side by side.
        file.write_table(table, row_group_size=max(1, len(records)))
        file.add_key_value_metadata({_CHECKSUM_KEY: CHECKSUM_PLACE})
    return with_checksum(bytes(sink.getvalue().to_pybytes()))


def _lists(parts: Sequence[Sequence[int]]) -> pa.Array:
    values = [np.asarray(part, np.int32) for part in parts]
    starts = np.cumsum([0] + [part.size for part in values], dtype=np.int32)
    joined = np.concatenate([np.zeros(0, np.int32), *values])
    return pa.ListArray.from_arrays(pa.array(starts), pa.array(joined))


def decode_segment(raw: bytes, name: SegmentName) -> list[ShardRecord] | None:
    """Read a segment; None where it is damaged or holds others than its name says."""
    # The bytes first: what is damaged never reaches the Parquet reader.
    if not has_valid_checksum(raw):
        return None
    try:
        table = pq.ParquetFile(pa.BufferReader(raw), pre_buffer=False).read(
            SEGMENT_SCHEMA.names, use_threads=False
        )
        records = list(records_of(table))
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return None
    wanted = [(name.split, index, shard_name(name.split, index)) for index in name.shards]
    return records if [(*record.key, record.path) for record in records] == wanted else None


def records_of(table: pa.Table) -> Iterator[ShardRecord]:
    """Yield the records of a segment's table; without the columns it lacks."""
    table = table.combine_chunks()
    present = table.column_names
    lists = {name: table.column(name).combine_chunks() for name in LENGTHS if name in present}
    plain = table.select([name for name in present if name not in LENGTHS]).to_pylist()
    for place, values in enumerate(plain):
        lengths: dict[str, Any] = {
            name: column[place].values.to_numpy() for name, column in lists.items()
        }
        yield ShardRecord(**values, **lengths)


def encode_record(record: ShardRecord) -> bytes:
    """Return the file of one shard's record, as it is committed."""
    return encode_segment([record])


def names_of(row_ids: bytes) -> list[str]:
    """Return the sample ids of rows, 32 hexadecimal digits each."""
    digits, size = row_ids.hex(), 2 * _ID_BYTES
    return [digits[at : at + size] for at in range(0, len(digits), size)]


def short_ids(names: Sequence[str]) -> bytes:
    """Return 16 bytes for each sample id; equal where the ids are."""
    return b"".join(_short_id(name) for name in names)


def _short_id(name: str) -> bytes:
    try:
        data = bytes.fromhex(name)
    except ValueError:
        data = b""
    # Ids that are not as FORMAT.md requires are compared by a digest.
    return data if len(data) == _ID_BYTES else bytes.fromhex(checksum(name.encode()))
