"""Rows of format version 2 to Arrow columns and back; all rows of a table in one go.

Legend: S rows, N counted positions of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cache.counter import dither, row_noise, sample_key
from pipeline.cache.ranked import COLUMNS, Blobs, RankedSpec
from pipeline.cache.ranked_decode import decode_targets
from pipeline.cache.ranked_encode import encode_targets
from pipeline.cache.sparse import CachedSequence
from pipeline.errors import CacheError

__all__ = ["RANKED_SCHEMA", "ranked_rows", "ranked_table"]

RANKED_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("num_counted", pa.int32(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("counted", pa.list_(pa.bool_()), nullable=False),
        *(pa.field(name, pa.binary(), nullable=False) for name in COLUMNS),
    ]
)


def ranked_table(
    rows: Sequence[CachedSequence],
    spec: RankedSpec,
    tails: Sequence[NDArray[np.float32]],
    metadata: dict[bytes, bytes],
) -> pa.Table:
    """Encode rows into an Arrow table."""
    dither_N = _dither([row.sample_id for row in rows], [row.counted_L for row in rows])
    blobs = encode_targets([row.targets for row in rows], tails, dither_N, spec)
    arrays = [
        pa.array([row.sample_id for row in rows], pa.string()),
        pa.array([int(row.input_ids_L.size) for row in rows], pa.int32()),
        pa.array([row.targets.num_positions for row in rows], pa.int32()),
        pa.array([row.input_ids_L for row in rows], pa.list_(pa.int32())),
        pa.array([row.counted_L for row in rows], pa.list_(pa.bool_())),
        *(_binary(blobs[name]) for name in COLUMNS),
    ]
    return pa.Table.from_arrays(arrays, schema=RANKED_SCHEMA.with_metadata(metadata))


def ranked_rows(
    table: pa.Table, spec: RankedSpec, temperatures: tuple[float, ...]
) -> list[CachedSequence]:
    """Decode the rows of a table.

    Raises:
        CacheError: a row whose columns contradict each other.
    """
    names = table.column("sample_id").to_pylist()
    ids, id_starts = _lists(table.column("input_ids"))
    counted, counted_starts = _lists(table.column("counted"))
    tokens_S = _numbers(table.column("num_tokens"))
    positions_S = _numbers(table.column("num_counted"))
    sums = np.concatenate([[0], np.cumsum(counted, dtype=np.int64)])
    counted_S = sums[counted_starts[1:]] - sums[counted_starts[:-1]]
    if not (
        np.array_equal(np.diff(id_starts), tokens_S)
        and np.array_equal(np.diff(counted_starts), tokens_S)
        and np.array_equal(counted_S, positions_S)
    ):
        raise CacheError("the columns of a row differ in length")
    if len(ids) and counted[id_starts[:-1][tokens_S > 0]].any():
        raise CacheError("a row counts its first token, which nothing precedes")
    targets = decode_targets(
        {name: _blobs(table.column(name)) for name in COLUMNS},
        positions_S,
        ids[counted].astype(np.int32),
        _dither(names, np.split(counted, counted_starts[1:-1])),
        spec,
        temperatures,
    )
    return [
        CachedSequence(
            sample_id=names[row],
            input_ids_L=ids[id_starts[row] : id_starts[row + 1]],
            counted_L=counted[id_starts[row] : id_starts[row + 1]],
            targets=target,
        )
        for row, target in enumerate(targets)
    ]


def _dither(sample_ids: Sequence[str], counted: Sequence[NDArray[np.bool_]]) -> NDArray[np.float32]:
    """Return the dither of every counted position; its row is the one that predicts it."""
    parts = [
        dither(row_noise(_key(name), np.flatnonzero(counted_L) - 1))
        for name, counted_L in zip(sample_ids, counted, strict=True)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _key(sample_id: str) -> int:
    try:
        return sample_key(sample_id)
    except ValueError:
        raise CacheError(
            f"a sample named {sample_id!r}", expected="32 hexadecimal digits"
        ) from None


def _binary(blobs: Blobs) -> pa.Array:
    if int(blobs.starts[-1]) > 0x7FFFFFFF:
        raise CacheError("a shard's column is larger than 2 GiB", do="lower capture.shard_tokens")
    offsets = pa.py_buffer(blobs.starts.astype(np.int32).tobytes())
    buffers = [None, offsets, pa.py_buffer(np.ascontiguousarray(blobs.data).tobytes())]
    return pa.Array.from_buffers(pa.binary(), len(blobs.starts) - 1, buffers)


def _blobs(column: pa.ChunkedArray) -> Blobs:
    array = _whole(column)
    starts = _starts(array)
    buffer = array.buffers()[2]
    data = np.zeros(0, np.uint8) if buffer is None else np.frombuffer(buffer, np.uint8)
    return Blobs(data[starts[0] : starts[-1]], starts - starts[0])


def _lists(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the values of all lists, and where each begins."""
    array = _whole(column)
    starts = _starts(array)
    values = array.values.to_numpy(zero_copy_only=False)
    return values[starts[0] : starts[-1]], starts - starts[0]


def _starts(array: pa.Array) -> NDArray[np.int64]:
    """Return the S + 1 offsets of a list or binary array, whose buffers may begin earlier."""
    buffer = array.buffers()[1]
    if buffer is None:
        return np.zeros(1, np.int64)
    offsets = np.frombuffer(buffer, np.int32)
    return offsets[array.offset : array.offset + len(array) + 1].astype(np.int64)


def _numbers(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(_whole(column).to_numpy(zero_copy_only=False), np.int64)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # no chunk at all, or too large for one
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    if array.null_count:
        raise CacheError("a column holds nulls")
    return array
