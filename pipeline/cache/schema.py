"""The Parquet schema of a shard, its footer metadata, and rows <-> Arrow columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cache.codec import CodecSpec, decode_rows, encode_entries
from pipeline.cache.ragged import blob_rows, list_rows
from pipeline.cache.sparse import CachedSequence, SparseTargets
from pipeline.errors import CacheError

__all__ = ["FORMAT_VERSION", "footer", "read_footer", "rows_to_table", "table_to_rows"]

FORMAT_VERSION = 1
_FOOTER_KEY = b"distil_cache"

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


def footer(
    spec: CodecSpec, temperatures: Sequence[float], identity_digest: str
) -> dict[bytes, bytes]:
    """Return the key-value metadata that lets a single shard explain itself."""
    data = {
        "format_version": FORMAT_VERSION,
        "identity_digest": identity_digest,
        "codec": spec.to_json(),
        "temperatures": list(temperatures),
    }
    return {_FOOTER_KEY: json.dumps(data, sort_keys=True).encode()}


def read_footer(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """Return the footer of a shard as a mapping.

    Raises:
        CacheError: the file is no shard of a cache, or of a newer format.
    """
    raw = (metadata or {}).get(_FOOTER_KEY)
    if raw is None:
        raise CacheError(
            "the Parquet file carries no distil_cache metadata", expected="a cache shard"
        )
    try:
        data: dict[str, Any] = json.loads(raw)
    except ValueError:
        raise CacheError("the shard's distil_cache metadata is damaged") from None
    version = data.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CacheError(
            f"a shard of format version {version}",
            expected=f"at most {FORMAT_VERSION}",
            do="upgrade this project to read it",
        )
    return data


def rows_to_table(
    rows: Sequence[CachedSequence],
    spec: CodecSpec,
    *,
    temperatures: Sequence[float],
    identity_digest: str,
    tails: Sequence[NDArray[np.float32]],
) -> pa.Table:
    """Encode rows into an Arrow table; `tails[i]` is the tail mass of row i's N positions."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for row, tail_N in zip(rows, tails, strict=True):
        targets = row.targets
        if targets.temperatures != tuple(temperatures):
            raise CacheError(f"row {row.sample_id} was captured on another temperature grid")
        if int(row.counted_L.sum()) != targets.num_positions or row.counted_L[:1].any():
            raise CacheError(f"row {row.sample_id}: its targets do not match its counted tokens")
        wanted = (targets.num_positions, len(temperatures))
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
    schema = SCHEMA.with_metadata(footer(spec, temperatures, identity_digest))
    return pa.Table.from_arrays(arrays, schema=schema)


def table_to_rows(
    table: pa.Table, spec: CodecSpec, temperatures: Sequence[float]
) -> list[CachedSequence]:
    """Decode the rows of `table`.

    Raises:
        CacheError: a row whose columns contradict each other.
    """
    grid = tuple(float(value) for value in temperatures)
    lists = [
        list_rows(table.column(name), dtype)
        for name, dtype in (
            ("counted", np.bool_), ("input_ids", np.int32), ("tail_mass", np.float32),
            ("log_z", np.float32), ("entropy", np.float32), ("gold_logprob", np.float32),
        )
    ]  # fmt: skip
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
