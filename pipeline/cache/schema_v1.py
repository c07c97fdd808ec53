"""Rows of format version 1 to Arrow columns and back; kept to read old caches and part them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cache.codec import CodecSpec, decode_entries, encode_entries
from pipeline.cache.sparse import CachedSequence, SparseTargets
from pipeline.errors import CacheError

__all__ = ["SCHEMA", "gaps_rows", "gaps_table"]

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("num_counted", pa.int32(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("counted", pa.list_(pa.bool_()), nullable=False),
        pa.field("entries", pa.binary(), nullable=False),
        pa.field("tail_mass", pa.list_(pa.float16()), nullable=False),
        pa.field("gold_logprob", pa.list_(pa.float16()), nullable=False),
        pa.field("log_z", pa.list_(pa.float16()), nullable=False),
        pa.field("entropy", pa.list_(pa.float16()), nullable=False),
    ]
)


def gaps_table(
    rows: Sequence[CachedSequence],
    spec: CodecSpec,
    tails: Sequence[NDArray[np.float32]],
    metadata: dict[bytes, bytes],
) -> pa.Table:
    """Encode rows of certain entries; `tails[i]` is the tail mass of row i's N positions."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for row, tail_N in zip(rows, tails, strict=True):
        targets = row.targets
        wanted = (targets.num_positions, len(targets.temperatures))
        fit = tail_N.size == targets.gold_logprob_N.size == targets.num_positions
        if not fit or not targets.log_z_NG.shape == targets.entropy_NG.shape == wanted:
            raise CacheError(f"row {row.sample_id}: its columns differ in length")
        columns["sample_id"].append(row.sample_id)
        columns["num_tokens"].append(int(row.input_ids_L.size))
        columns["num_counted"].append(targets.num_positions)
        columns["input_ids"].append(row.input_ids_L)
        columns["counted"].append(row.counted_L)
        columns["entries"].append(encode_entries(targets, spec))
        columns["tail_mass"].append(np.clip(tail_N, 0, 1).astype(np.float16))
        columns["gold_logprob"].append(targets.gold_logprob_N.astype(np.float16))
        columns["log_z"].append(targets.log_z_NG.reshape(-1).astype(np.float16))
        columns["entropy"].append(targets.entropy_NG.reshape(-1).astype(np.float16))
    arrays = [pa.array(columns[field.name], type=field.type) for field in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(metadata))


def gaps_rows(table: pa.Table, spec: CodecSpec, grid: tuple[float, ...]) -> list[CachedSequence]:
    """Decode the rows of a table.

    Raises:
        CacheError: a row whose columns contradict each other.
    """
    reader = {name: table.column(name).combine_chunks() for name in SCHEMA.names}
    rows: list[CachedSequence] = []
    for index in range(table.num_rows):
        num_positions = int(reader["num_counted"][index].as_py())
        sample_id = str(reader["sample_id"][index].as_py())

        def numbers(name: str, index: int = index) -> NDArray[Any]:
            values = reader[name][index].values
            return np.asarray(values.to_numpy(zero_copy_only=False))

        counted_L = numbers("counted").astype(np.bool_)
        input_ids_L = numbers("input_ids").astype(np.int32)
        tail_N = numbers("tail_mass").astype(np.float32)
        log_z = numbers("log_z").astype(np.float32)
        entropy = numbers("entropy").astype(np.float32)
        gold_N = numbers("gold_logprob").astype(np.float32)
        shapes_fit = (
            counted_L.size == input_ids_L.size
            and int(counted_L.sum()) == num_positions == tail_N.size == gold_N.size
            and log_z.size == entropy.size == num_positions * len(grid)
        )
        if not shapes_fit:
            raise CacheError(f"row {sample_id}: its columns differ in length")
        counts_N, ids_E, logprobs_E = decode_entries(
            reader["entries"][index].as_buffer(), num_positions, spec, tail_N=tail_N
        )
        rows.append(
            CachedSequence(
                sample_id=sample_id,
                input_ids_L=input_ids_L,
                counted_L=counted_L,
                targets=SparseTargets(
                    counts_N=counts_N,
                    token_ids_E=ids_E,
                    logprobs_E=logprobs_E,
                    inclusion_E=None,
                    temperatures=grid,
                    log_z_NG=log_z.reshape(num_positions, len(grid)),
                    entropy_NG=entropy.reshape(num_positions, len(grid)),
                    gold_logprob_N=gold_N,
                ),
            )
        )
    return rows
