"""Rows of format version 1 to Arrow columns and back; kept to read old caches and part them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cache.codec.gaps import CodecSpec, decode_rows, encode_entries
from pipeline.cache.codec.ragged import blob_rows, list_rows
from pipeline.cache.codec.targets import CachedSequence, SparseTargets
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
_REALS = tuple((name, np.float32) for name in ("tail_mass", "log_z", "entropy", "gold_logprob"))


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
    lists = [
        list_rows(table.column(name), dtype)
        for name, dtype in (("counted", np.bool_), ("input_ids", np.int32), *_REALS)
    ]
    names, numbers = (table.column(name).to_pylist() for name in ("sample_id", "num_counted"))
    blobs = list(blob_rows(table.column("entries")))
    arrays = list(zip(*lists, strict=True))
    for sample_id, number, row in zip(names, numbers, arrays, strict=True):
        counted_L, input_ids_L, tail_N, log_z, entropy, gold_N = row
        shapes_fit = (
            counted_L.size == input_ids_L.size
            and np.count_nonzero(counted_L) == number == tail_N.size == gold_N.size
            and log_z.size == entropy.size == number * len(grid)
        )
        if not shapes_fit:
            raise CacheError(f"row {sample_id}: its columns differ in length")
        if counted_L[:1].any():
            raise CacheError(f"row {sample_id} counts its first token, which nothing precedes")
        for (name, _), values in zip(_REALS, row[2:], strict=True):
            if not np.isfinite(values).all():
                raise CacheError(f"row {sample_id}: {name} is not finite")
        gold_ids_N = input_ids_L[counted_L]
        if gold_ids_N.size and not 0 <= gold_ids_N.min() <= gold_ids_N.max() < spec.vocab_size:
            raise CacheError(f"row {sample_id}: a counted token is outside the vocabulary")
    entries = decode_rows(blobs, numbers, spec, tails=[row[2] for row in arrays])
    return [
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
                log_z_NG=log_z.reshape(-1, len(grid)),
                entropy_NG=entropy.reshape(-1, len(grid)),
                gold_logprob_N=gold_N,
            ),
        )
        for sample_id, (counted_L, input_ids_L, _, log_z, entropy, gold_N), (
            counts_N,
            ids_E,
            logprobs_E,
        ) in zip(names, arrays, entries, strict=True)
    ]
