"""Rows to Arrow columns and back; all rows of a table in one go.

Legend: S rows, T tokens and N supervised positions of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cache.codec.decode import to_targets, unpack
from pipeline.cache.codec.encode import pack, quantise
from pipeline.cache.codec.spec import (
    Blobs,
    CodecSpec,
    CodedRows,
    frequency_classes,
    order_of_classes,
    pack_classes,
    unpack_order,
)
from pipeline.cache.codec.targets import CachedSequence
from pipeline.errors import CacheError
from pipeline.sampling.noise import dither, row_noise, sample_key

__all__ = [
    "SHARD_SCHEMA", "Heads", "coded_rows", "coded_table",
    "quantised", "shard_schema", "statistics_of", "targets_of",
]  # fmt: skip

_HEADS = [
    pa.field("sample_id", pa.string(), nullable=False),
    pa.field("num_tokens", pa.int32(), nullable=False),
    pa.field("num_loss_tokens", pa.int32(), nullable=False),
    pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
    pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
]


def shard_schema(spec: CodecSpec) -> pa.Schema:
    """Return the columns of a shard of this codec."""
    return pa.schema([*_HEADS, *(pa.field(n, pa.binary(), nullable=False) for n in spec.columns)])


SHARD_SCHEMA = shard_schema(CodecSpec(1))
"""The columns of every shard."""
_ORDER_KEY = b"distill_ranks"


@dataclass(frozen=True, slots=True)
class Heads:
    """The columns of a table's S sequences that are not targets."""

    sample_ids: list[str]
    input_ids_T: NDArray[np.int32]
    loss_mask_T: NDArray[np.bool_]
    starts: NDArray[np.int64]
    """S + 1 offsets of the rows' tokens, the first 0."""

    @classmethod
    def of_rows(cls, rows: Sequence[CachedSequence]) -> Heads:
        """Concatenate the rows' columns."""
        lengths = [row.input_ids_L.size for row in rows]
        return cls(
            [row.sample_id for row in rows],
            np.concatenate([np.zeros(0, np.int32), *(row.input_ids_L for row in rows)]),
            np.concatenate([np.zeros(0, bool), *(row.loss_mask_L for row in rows)]),
            np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        )

    @classmethod
    def of_table(cls, table: pa.Table) -> Heads:
        """Read the columns and check that they agree.

        Raises:
            CacheError: columns that contradict each other.
        """
        ids, id_starts = _lists(table.column("input_ids"))
        loss_mask, mask_starts = _lists(table.column("loss_mask"))
        heads = cls(table.column("sample_id").to_pylist(), ids, loss_mask, id_starts)
        lengths_S = id_starts[1:] - id_starts[:-1]
        if not (
            np.array_equal(lengths_S, _numbers(table.column("num_tokens")))
            and np.array_equal(id_starts, mask_starts)
            and np.array_equal(heads.positions_S, _numbers(table.column("num_loss_tokens")))
        ):
            raise CacheError("the columns of a row differ in length")
        first_S = id_starts[:-1][lengths_S > 0]
        if loss_mask[first_S].any():
            raise CacheError("a row's loss_mask includes its first token, which has no context")
        return heads

    @classmethod
    def join(cls, parts: Sequence[Heads]) -> Heads:
        """Return the rows of all parts."""
        lengths = np.concatenate([np.diff(part.starts) for part in parts])
        return cls(
            [name for part in parts for name in part.sample_ids],
            np.concatenate([part.input_ids_T for part in parts]),
            np.concatenate([part.loss_mask_T for part in parts]),
            np.concatenate([[0], np.cumsum(lengths)]),
        )

    @property
    def positions_S(self) -> NDArray[np.int64]:
        """The number of supervised positions of each row."""
        sums = np.concatenate([[0], np.cumsum(self.loss_mask_T, dtype=np.int64)])
        ends: NDArray[np.int64] = sums[self.starts]
        return ends[1:] - ends[:-1]

    @property
    def label_ids_N(self) -> NDArray[np.int32]:
        """The supervised tokens."""
        return self.input_ids_T[self.loss_mask_T].astype(np.int32)

    def keys_S(self) -> NDArray[np.uint64]:
        """The key of each row's random numbers.

        Raises:
            CacheError: a sample id that is not as FORMAT.md requires.
        """
        keys = [_key(name) for name in self.sample_ids]
        return np.array(keys, np.uint64)

    def noise_N(self) -> NDArray[np.int64]:
        """Random bits of every supervised position, by the place that predicts it."""
        places_N = np.flatnonzero(self.loss_mask_T)
        positions_S = self.positions_S
        rows_N = places_N - np.repeat(self.starts[:-1], positions_S) - 1
        return row_noise(np.repeat(self.keys_S(), positions_S), rows_N)


def quantised(
    rows: Sequence[CachedSequence], spec: CodecSpec, tails: Sequence[NDArray[np.float32]]
) -> tuple[Heads, CodedRows]:
    """Quantise rows."""
    heads = Heads.of_rows(rows)
    label_N = heads.label_ids_N
    if label_N.size and label_N.max() >= spec.vocab_size:
        raise CacheError(f"a supervised token is outside the vocabulary of {spec.vocab_size}")
    dither_N = dither(heads.noise_N())
    return heads, quantise([row.targets for row in rows], tails, dither_N, spec)


def coded_table(
    heads: Heads, coded: CodedRows, spec: CodecSpec, metadata: dict[bytes, bytes]
) -> pa.Table:
    """Write integers as an Arrow table; ids are ranked by their frequency in these rows."""
    classes_V = frequency_classes(coded, spec.vocab_size)
    blobs = pack(coded, order_of_classes(classes_V), spec)
    starts = pa.array(heads.starts, pa.int32())
    arrays = [
        pa.array(heads.sample_ids, pa.string()),
        pa.array(np.diff(heads.starts), pa.int32()),
        pa.array(coded.positions_S, pa.int32()),
        pa.ListArray.from_arrays(starts, pa.array(heads.input_ids_T, pa.int32())),
        pa.ListArray.from_arrays(starts, pa.array(heads.loss_mask_T, pa.bool_())),
        *(_binary(blobs[name]) for name in spec.columns),
    ]
    schema = shard_schema(spec).with_metadata({**metadata, _ORDER_KEY: pack_classes(classes_V)})
    return pa.Table.from_arrays(arrays, schema=schema)


def coded_rows(
    table: pa.Table, spec: CodecSpec, temperatures: tuple[float, ...]
) -> tuple[Heads, CodedRows]:
    """Read the integers of a table's rows.

    Raises:
        CacheError: columns that contradict each other or cannot have been written.
    """
    heads = Heads.of_table(table)
    packed = (table.schema.metadata or {}).get(_ORDER_KEY, b"")
    order_V = unpack_order(packed, spec.vocab_size)
    columns = {name: _blobs(table.column(name)) for name in spec.columns}
    return heads, unpack(columns, heads.positions_S, order_V, spec, temperatures)


def targets_of(
    heads: Heads, coded: CodedRows, spec: CodecSpec, temperatures: tuple[float, ...]
) -> list[CachedSequence]:
    """Return decoded rows.

    Raises:
        CacheError: supervised tokens outside the vocabulary, or entries that cannot have been
            sampled.
    """
    label_N = heads.label_ids_N
    if label_N.size and not 0 <= label_N.min() <= label_N.max() < spec.vocab_size:
        raise CacheError(f"a supervised token is outside the vocabulary of {spec.vocab_size}")
    targets = to_targets(coded, label_N, dither(heads.noise_N()), spec, temperatures)
    ends = heads.starts.tolist()
    return [
        CachedSequence(
            sample_id=heads.sample_ids[row],
            input_ids_L=heads.input_ids_T[ends[row] : ends[row + 1]],
            loss_mask_L=heads.loss_mask_T[ends[row] : ends[row + 1]],
            targets=target,
        )
        for row, target in enumerate(targets)
    ]


def statistics_of(
    table: pa.Table, spec: CodecSpec, temperatures: tuple[float, ...]
) -> tuple[Heads, NDArray[np.float32], NDArray[np.float32]]:
    """Read what can be known of rows without their entries, from four of the columns.

    Args:
        table: with `sample_id`, `loss_mask`, `label_logprob` and `entropy`.
        spec: of the cache.
        temperatures: the grid.

    Returns:
        The rows without token ids, and of all supervised positions log p of the label and the
        entropy at temperature 1, float32 [N].

    Raises:
        CacheError: columns that contradict each other.
    """
    loss_mask, starts = _lists(table.column("loss_mask"))
    heads = Heads(table.column("sample_id").to_pylist(), np.zeros(0, np.int32), loss_mask, starts)
    labels, entropies = (_blobs(table.column(name)) for name in ("label_logprob", "entropy"))
    positions_S, grid = heads.positions_S, len(temperatures)
    if not (
        np.array_equal(np.diff(labels.starts), positions_S)
        and np.array_equal(np.diff(entropies.starts), grid * positions_S)
    ):
        raise CacheError("the columns of a row differ in length")
    # A row's entropies are those of one temperature after the other.
    first_S = entropies.starts[:-1] + temperatures.index(1.0) * positions_S
    places_N = np.arange(positions_S.sum()) + np.repeat(
        first_S - np.cumsum(positions_S) + positions_S, positions_S
    )
    values = spec.quantisation
    entropy_N = values.entropy_value(entropies.data[places_N], dither(heads.noise_N()))
    return heads, values.always_kept_values()[labels.data], entropy_N


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
    if array.values.null_count:
        raise CacheError("a list holds nulls")
    values = array.values.to_numpy(zero_copy_only=False)
    return values[starts[0] : starts[-1]], starts - starts[0]


def _starts(array: pa.Array) -> NDArray[np.int64]:
    """Return the S + 1 offsets of a list or binary array, whose buffers may begin earlier."""
    buffer = array.buffers()[1]
    if buffer is None or not len(array):
        return np.zeros(len(array) + 1, np.int64)
    offsets = np.frombuffer(buffer, np.int32)
    return offsets[array.offset : array.offset + len(array) + 1].astype(np.int64)


def _numbers(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(_whole(column).to_numpy(zero_copy_only=False), np.int64)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    if column.null_count:
        raise CacheError("a column holds nulls")
    if column.num_chunks == 1:
        return column.chunk(0)
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # no chunk at all, or too large for one
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    return array
