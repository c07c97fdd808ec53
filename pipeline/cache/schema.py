"""A shard's footer, and its rows to Arrow columns and back, whatever the format version."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cache.codec import CodecSpec, decode_entries, encode_entries
from pipeline.cache.ranked import RankedSpec
from pipeline.cache.schema_ranked import RANKED_SCHEMA, ranked_rows, ranked_table
from pipeline.cache.sparse import CachedSequence, SparseTargets
from pipeline.errors import CacheError

__all__ = [
    "FORMAT_VERSION",
    "Spec",
    "column_names",
    "footer",
    "read_footer",
    "read_spec",
    "rows_to_table",
    "table_to_rows",
    "version_of",
]

FORMAT_VERSION = 2
"""The newest version, which is the one written; older ones are read for ever."""

Spec = CodecSpec | RankedSpec
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


def version_of(spec: Spec) -> int:
    """Return the format version that a codec belongs to."""
    return 2 if isinstance(spec, RankedSpec) else 1


def read_spec(data: dict[str, Any], order_V: NDArray[np.int32] | None = None) -> Spec:
    """Return the codec that its JSON form describes; `order_V` where it names an order.

    Raises:
        CacheError: a codec this version does not know, or values it cannot have.
    """
    if data.get("name") == "ranked":
        return RankedSpec.from_json(data, order_V)
    return CodecSpec.from_json(data)


def column_names(spec: Spec) -> list[str]:
    """Return the columns a reader needs."""
    names: list[str] = (RANKED_SCHEMA if isinstance(spec, RankedSpec) else SCHEMA).names
    return names


def footer(spec: Spec, temperatures: Sequence[float], identity_digest: str) -> dict[bytes, bytes]:
    """Return the key-value metadata that lets a single shard explain itself."""
    data = {
        "format_version": version_of(spec),
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
    spec: Spec,
    *,
    temperatures: Sequence[float],
    identity_digest: str,
    tails: Sequence[NDArray[np.float32]],
) -> pa.Table:
    """Encode rows into an Arrow table; `tails[i]` is the tail mass of row i's N positions."""
    for row in rows:
        if row.targets.temperatures != tuple(temperatures):
            raise CacheError(f"row {row.sample_id} was captured on another temperature grid")
        if int(row.counted_L.sum()) != row.targets.num_positions or row.counted_L[:1].any():
            raise CacheError(f"row {row.sample_id}: its targets do not match its counted tokens")
    metadata = footer(spec, temperatures, identity_digest)
    if isinstance(spec, RankedSpec):
        return ranked_table(rows, spec, tails, metadata)
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for row, tail_N in zip(rows, tails, strict=True):
        targets = row.targets
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
    schema = SCHEMA.with_metadata(metadata)
    return pa.Table.from_arrays(arrays, schema=schema)


def table_to_rows(
    table: pa.Table, spec: Spec, temperatures: Sequence[float]
) -> list[CachedSequence]:
    """Decode the rows of `table`.

    Raises:
        CacheError: a row whose columns contradict each other.
    """
    grid = tuple(float(value) for value in temperatures)
    if isinstance(spec, RankedSpec):
        return ranked_rows(table, spec, grid)
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
