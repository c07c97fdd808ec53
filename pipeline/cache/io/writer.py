"""Rows to committed shards, and committed shards to a manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.arrow import Heads, coded_table, quantised
from pipeline.cache.codec.spec import CodecSpec, CodedRows
from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.parquet import parquet_bytes
from pipeline.cache.layout.card import card_text
from pipeline.cache.layout.manifest import (
    MANIFEST,
    ROWS,
    Manifest,
    ShardRecord,
    checksum,
    decode_record,
    encode_record,
    pack_rows_index,
    record_name,
    shard_name,
    tokenizer_name,
)
from pipeline.cache.layout.schema import FORMAT_VERSION, check_rows, footer
from pipeline.errors import CacheError
from pipeline.sampling.noise import dither
from pipeline.storage import Store

__all__ = [
    "commit_shard", "encode_shard", "finalize", "intact_record", "pack_shard",
]  # fmt: skip


def encode_shard(
    rows: Sequence[CachedSequence],
    spec: CodecSpec,
    *,
    split: str,
    index: int,
    temperatures: Sequence[float],
    identity_digest: str,
    tails: Sequence[NDArray[np.float32]],
) -> tuple[ShardRecord, bytes]:
    """Return a shard's record and its Parquet bytes; a pure function of its arguments."""
    check_rows(rows, temperatures)
    heads, coded = quantised(rows, spec, tails)
    return pack_shard(
        heads,
        coded,
        spec,
        split=split,
        index=index,
        temperatures=temperatures,
        identity_digest=identity_digest,
    )


def pack_shard(
    heads: Heads,
    coded: CodedRows,
    spec: CodecSpec,
    *,
    split: str,
    index: int,
    temperatures: Sequence[float],
    identity_digest: str,
) -> tuple[ShardRecord, bytes]:
    """Return the record and the Parquet bytes of rows that are quantised already."""
    data = parquet_bytes(
        coded_table(heads, coded, spec, footer(spec, temperatures, identity_digest))
    )
    loss_tokens = int(coded.positions_S.sum())
    codes_N = coded.entropy_NG[:, list(temperatures).index(1.0)]
    entropy_N = spec.quantisation.entropy_value(codes_N, dither(heads.noise_N()))
    entropy = float(entropy_N.sum(dtype=np.float64))
    lengths_S = np.diff(heads.starts)
    record = ShardRecord(
        split=split,
        index=index,
        path=shard_name(split, index),
        rows=len(heads.sample_ids),
        tokens=int(lengths_S.sum()),
        loss_tokens=loss_tokens,
        entries=coded.num_entries(spec),
        bytes=len(data),
        xxh3_128=checksum(data),
        kept_mass=round(float(coded.kept_mass_N(spec).sum()) / max(loss_tokens, 1), 6),
        entropy=round(entropy / max(loss_tokens, 1), 6),
        row_tokens=tuple(lengths_S.tolist()),
        row_loss_tokens=tuple(coded.positions_S.tolist()),
    )
    return record, data


def commit_shard(store: Store, record: ShardRecord, data: bytes) -> None:
    """Write the shard, then its record; a shard is committed once its record exists.

    If the process is killed between the two, the next run finds no record and writes the same
    bytes again.
    """
    store.write(record.path, data)
    store.write(record_name(record.split, record.index), encode_record(record))


def intact_record(store: Store, split: str, index: int, *, check_bytes: bool) -> ShardRecord | None:
    """Return the record of a committed shard, or None where it has to be written (again).

    Args:
        store: the cache's root.
        split: `train` or `heldout`.
        index: the shard's number within the split.
        check_bytes: read the shard and compare its checksum, not only its size.
    """
    try:
        record = decode_record(store.read(record_name(split, index)))
        if record is None or (record.split, record.index) != (split, index):
            return None
        if store.size(record.path) != record.bytes:
            return None
        if check_bytes and checksum(store.read(record.path)) != record.xxh3_128:
            return None
    except FileNotFoundError:
        return None
    return record


def finalize(
    store: Store,
    records: Sequence[ShardRecord],
    *,
    identity: Mapping[str, Any],
    spec: CodecSpec,
    temperatures: Sequence[float],
    corpus_counts: Mapping[str, int],
    tokenizer_files: Sequence[str],
    command: str,
) -> Manifest:
    """Write the row index, the card and, last, the manifest.

    Raises:
        CacheError: the cache would hold no training row, or lacks a tokenizer file.
    """
    if not any(record.rows for record in records if record.split == "train"):
        raise CacheError("the cache would hold no training rows", expected="at least one")
    try:
        tokenizer = {name: checksum(store.read(tokenizer_name(name))) for name in tokenizer_files}
    except FileNotFoundError as error:
        raise CacheError(f"{store.url}: a tokenizer file is missing ({error})") from None
    rows_index = pack_rows_index(records)
    manifest = Manifest(
        identity=dict(identity),
        codec=spec.to_json(),
        temperatures=tuple(temperatures),
        shards=tuple(records),
        corpus_counts=dict(corpus_counts),
        tokenizer_xxh3_128=tokenizer,
        rows_xxh3_128=checksum(rows_index),
        format_version=FORMAT_VERSION,
    )
    store.write(ROWS, rows_index)
    store.write("README.md", card_text(manifest, command).encode())
    store.write(MANIFEST, manifest.to_bytes())
    return manifest
