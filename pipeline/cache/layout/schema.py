"""A shard's footer, and its rows to Arrow columns and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.cache.codec.arrow import SHARD_SCHEMA, coded_rows, shard_schema, targets_of
from pipeline.cache.codec.spec import CODEC_NAME, CodecSpec
from pipeline.cache.codec.subsample import ALL_ENTRIES, EntryLimit
from pipeline.cache.codec.targets import CachedSequence
from pipeline.errors import CacheError

__all__ = [
    "FORMAT_VERSION",
    "check_rows",
    "column_names",
    "footer",
    "read_footer",
    "read_spec",
    "table_to_rows",
]

FORMAT_VERSION = 1
_FOOTER_KEY = b"distill_cache"


def read_spec(data: dict[str, Any]) -> CodecSpec:
    """Return the codec that its JSON form describes.

    Raises:
        CacheError: a codec this version does not know, or values it cannot have.
    """
    if data.get("name") != CODEC_NAME:
        raise CacheError(
            f"the cache's codec is {data.get('name')!r}",
            expected=CODEC_NAME,
            do="read it with the version of this project that wrote it, or a newer one",
        )
    return CodecSpec.from_json(data)


def column_names(spec: CodecSpec | None = None) -> list[str]:
    """Return the columns a reader of a codec needs; None: those of every codec."""
    names: list[str] = (SHARD_SCHEMA if spec is None else shard_schema(spec)).names
    return names


def footer(
    spec: CodecSpec,
    temperatures: Sequence[float],
    identity_digest: str,
    *,
    source_xxh3_128: str = "",
    rows_quarantined: int = 0,
) -> dict[bytes, bytes]:
    """Return the key-value metadata by which a shard can be read without the manifest.

    With it goes what its record cannot learn from its rows, so that a lost record is made again.
    """
    data: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "identity_digest": identity_digest,
        "codec": spec.to_json(),
        "temperatures": list(temperatures),
    }
    if source_xxh3_128:
        data["source_xxh3_128"] = source_xxh3_128
    if rows_quarantined:
        data["rows_quarantined"] = rows_quarantined
    return {_FOOTER_KEY: json.dumps(data, sort_keys=True).encode()}


def read_footer(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """Return the footer of a shard as a mapping.

    Raises:
        CacheError: the file is not a shard of a cache, or of a newer format.
    """
    raw = (metadata or {}).get(_FOOTER_KEY)
    if raw is None:
        raise CacheError(
            "the Parquet file carries no distill_cache metadata", expected="a cache shard"
        )
    try:
        data: dict[str, Any] = json.loads(raw)
    except ValueError:
        raise CacheError("the shard's distill_cache metadata is damaged") from None
    version = data.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CacheError(
            f"a shard of format version {version}",
            expected=f"at most {FORMAT_VERSION}",
            do="upgrade this project to read it",
        )
    return data


def check_rows(rows: Sequence[CachedSequence], temperatures: Sequence[float]) -> None:
    """Reject rows of another temperature grid, or whose targets do not fit their loss mask.

    Raises:
        CacheError: there is such a row.
    """
    for row in rows:
        if row.targets.temperatures != tuple(temperatures):
            raise CacheError(f"row {row.sample_id} was captured on another temperature grid")
        if int(row.loss_mask_L.sum()) != row.targets.num_positions or row.loss_mask_L[:1].any():
            raise CacheError(f"row {row.sample_id}: its targets do not match its supervised tokens")


def table_to_rows(
    table: pa.Table, spec: CodecSpec, temperatures: Sequence[float], limit: EntryLimit = ALL_ENTRIES
) -> list[CachedSequence]:
    """Decode the rows of `table`, with the requested entries.

    Raises:
        CacheError: a row whose columns contradict each other.
    """
    grid = tuple(float(value) for value in temperatures)
    heads, coded = coded_rows(table, spec, grid)
    coded = limit.of_coded(coded, heads.noise_N, spec, grid)
    return targets_of(heads, coded, limit.of_spec(spec), grid)
