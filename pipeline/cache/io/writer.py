"""Rows to committed shards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.arrow import Heads, coded_table, quantised
from pipeline.cache.codec.spec import CodecSpec, CodedRows
from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.parquet import parquet_bytes
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.names import record_name, shard_name
from pipeline.cache.layout.records import ShardRecord, encode_record, short_ids
from pipeline.cache.layout.schema import check_rows, footer
from pipeline.sampling.noise import dither
from pipeline.storage import Store

__all__ = ["commit_shard", "encode_shard", "pack_shard"]


def encode_shard(
    rows: Sequence[CachedSequence],
    spec: CodecSpec,
    *,
    split: str,
    index: int,
    temperatures: Sequence[float],
    identity_digest: str,
    tails: Sequence[NDArray[np.float32]],
    source_xxh3_128: str = "",
    rows_quarantined: int = 0,
) -> tuple[ShardRecord, bytes]:
    """Return a shard's record and its Parquet bytes; a pure function of its arguments.

    `source_xxh3_128` is the checksum of the prepared text of the rows, `rows_quarantined` the
    number of those that are missing; the record keeps both.
    """
    check_rows(rows, temperatures)
    spec = spec.of_split(split)
    heads, coded = quantised(rows, spec, tails)
    return pack_shard(
        heads,
        coded,
        spec,
        split=split,
        index=index,
        temperatures=temperatures,
        identity_digest=identity_digest,
        source_xxh3_128=source_xxh3_128,
        rows_quarantined=rows_quarantined,
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
    source_xxh3_128: str = "",
    rows_quarantined: int = 0,
) -> tuple[ShardRecord, bytes]:
    """Return the record and the Parquet bytes of rows that are quantised already.

    `spec` is the codec of their split.
    """
    data = parquet_bytes(
        coded_table(
            heads,
            coded,
            spec,
            footer(
                spec,
                temperatures,
                identity_digest,
                source_xxh3_128=source_xxh3_128,
                rows_quarantined=rows_quarantined,
            ),
        )
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
        source_xxh3_128=source_xxh3_128,
        rows_quarantined=rows_quarantined,
        row_tokens=lengths_S.tolist(),
        row_loss_tokens=coded.positions_S.tolist(),
        row_ids=short_ids(heads.sample_ids),
    )
    return record, data


def commit_shard(store: Store, record: ShardRecord, data: bytes) -> None:
    """Write the shard, then its record; a shard is committed once its record exists.

    If the process is killed between the two, the next run finds no record and writes the same
    bytes again. Of an object store three requests: what arrived of the shard is asked for, because
    its record vouches for it; the record carries its own checksum.
    """
    store.write(record.path, data)
    store.write(record_name(*record.key), encode_record(record), look_back=False)
