"""A shard's footer, and its rows to Arrow columns and back, whatever the format version."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cache.codec.arrow import (
    RANKED_SCHEMA,
    coded_rows,
    coded_table,
    decoded_statistics,
    quantised,
    targets_of,
)
from pipeline.cache.codec.arrow_v1 import SCHEMA, gaps_rows, gaps_table
from pipeline.cache.codec.gaps import CodecSpec
from pipeline.cache.codec.spec import RankedSpec
from pipeline.cache.codec.subsample import WHOLE, Less
from pipeline.cache.codec.targets import CachedSequence, Statistics
from pipeline.errors import CacheError

__all__ = [
    "FORMAT_VERSION",
    "Spec",
    "check_rows",
    "column_names",
    "footer",
    "read_footer",
    "read_spec",
    "rows_to_table",
    "table_to_rows",
    "table_to_statistics",
    "version_of",
]

FORMAT_VERSION = 2
"""The newest version, which is the one written; older ones are read for ever."""

Spec = CodecSpec | RankedSpec
_FOOTER_KEY = b"distil_cache"


def version_of(spec: Spec) -> int:
    """Return the format version that a codec belongs to."""
    return 2 if isinstance(spec, RankedSpec) else 1


def read_spec(data: dict[str, Any]) -> Spec:
    """Return the codec that its JSON form describes.

    Raises:
        CacheError: a codec this version does not know, or values it cannot have.
    """
    if data.get("name") == "ranked":
        return RankedSpec.from_json(data)
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
    """Encode rows into an Arrow table; `tails[i]` is the tail mass of row i's N positions.

    Raises:
        CacheError: rows that do not fit the codec, or themselves.
    """
    check_rows(rows, temperatures)
    metadata = footer(spec, temperatures, identity_digest)
    if isinstance(spec, RankedSpec):
        heads, coded = quantised(rows, spec, tails)
        return coded_table(heads, coded, spec, metadata)
    return gaps_table(rows, spec, tails, metadata)


def check_rows(rows: Sequence[CachedSequence], temperatures: Sequence[float]) -> None:
    """Refuse rows of another temperature grid, or whose targets are not their counted tokens'.

    Raises:
        CacheError: there is one.
    """
    for row in rows:
        if row.targets.temperatures != tuple(temperatures):
            raise CacheError(f"row {row.sample_id} was captured on another temperature grid")
        if int(row.counted_L.sum()) != row.targets.num_positions or row.counted_L[:1].any():
            raise CacheError(f"row {row.sample_id}: its targets do not match its counted tokens")


def table_to_rows(
    table: pa.Table, spec: Spec, temperatures: Sequence[float], less: Less = WHOLE
) -> list[CachedSequence]:
    """Decode the rows of `table`, with as many entries as asked for.

    Raises:
        CacheError: a row whose columns contradict each other.
    """
    grid = tuple(float(value) for value in temperatures)
    if isinstance(spec, RankedSpec):
        heads, coded = coded_rows(table, spec, grid)
        coded = less.of_coded(coded, heads.noise_N, spec, grid)
        return targets_of(heads, coded, less.of_spec(spec), grid)
    return [less.of_row(row) for row in gaps_rows(table, spec, grid)]


def table_to_statistics(
    table: pa.Table, spec: Spec, temperatures: Sequence[float]
) -> list[Statistics]:
    """Return what is stored of each row without its entries; of version 2 none is decoded.

    Raises:
        CacheError: a row whose columns contradict each other.
    """
    grid = tuple(float(value) for value in temperatures)
    if isinstance(spec, RankedSpec):
        return decoded_statistics(table, spec, grid)
    targets = [row.targets for row in gaps_rows(table, spec, grid)]
    return [Statistics(t.gold_logprob_N, t.log_z_NG, t.entropy_NG) for t in targets]
