"""Export a cache as plain Parquet lists, for trainers without its codec."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.reader import Cache
from pipeline.cache.layout.names import MANIFEST, PLAN, SPLITS
from pipeline.cache.tools.derive import check_apart
from pipeline.errors import CacheError
from pipeline.sampling.quantisation import rounding_log_bias
from pipeline.storage import Store

__all__ = ["export_plain"]

_PLAIN = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("loss_mask", pa.list_(pa.bool_())),
        pa.field("target_ids", pa.list_(pa.list_(pa.int32()))),
        pa.field("target_logprobs", pa.list_(pa.list_(pa.float16()))),
    ]
)
_PLAIN_SAMPLED = _PLAIN.append(pa.field("target_inclusion", pa.list_(pa.list_(pa.float32()))))
"""For sampled targets: without inclusion probabilities the entries would give biased targets."""


def export_plain(
    cache: Cache,
    target: Store,
    *,
    top_k: int | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> int:
    """Write every shard as `data/<split>/<index>.parquet` of plain lists; return the rows.

    `target_ids` and `target_logprobs` hold one list for each supervised token, in order: the
    entries of its target, and log p at temperature 1 in float16. Of a sampled cache
    `target_inclusion` holds the inclusion probabilities, 1 for always-kept entries:
    exp(log p) / inclusion is an unbiased target at temperature 1. Existing shards are kept, so a
    killed export can be continued; `_EXPORT` names the cache that is exported.

    Args:
        cache: what to export.
        target: the folder to write to; not within the cache.
        top_k: only the largest entries of each position, this many; None for all.
        on_rows: called with the number of rows written.

    Raises:
        CacheError: the target is the cache's own folder or within it, or holds a cache or another
            export; a shard is damaged; `top_k` of sampled targets.
    """
    check_apart(target, [cache.store])
    _reserve_target(cache, target, top_k)
    schema = _PLAIN if cache.rule is None else _PLAIN_SAMPLED
    rows_done = 0
    for split in SPLITS:
        source = cache.source(split, top_k=top_k)
        for shard, count in enumerate(source.shard_rows()):
            path = source.shards[shard].path
            if not target.exists(path):
                sink = pa.BufferOutputStream()
                with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
                    for start in range(0, count, _BATCH_ROWS):
                        rows = source.read_rows(
                            shard, range(start, min(count, start + _BATCH_ROWS))
                        )
                        writer.write_table(_table(rows, schema))
                target.write(path, sink.getvalue().to_pybytes())
            rows_done += count
            if on_rows is not None:
                on_rows(count)
    return rows_done


_MARK = "_EXPORT"
_BATCH_ROWS = 256
"""Lists are several times larger than encoded rows; this many rows are converted at a time."""


def _reserve_target(cache: Cache, target: Store, top_k: int | None) -> None:
    """Reject a folder with other content: its files would be taken for exported shards."""
    wanted = {"identity_digest": cache.manifest.identity_digest, "top_k": top_k}
    if target.exists(MANIFEST) or target.exists(PLAN):
        raise CacheError(f"{target.url}: holds a cache", expected="another folder")
    if not target.create(_MARK, json.dumps(wanted).encode()):
        try:
            found = json.loads(target.read(_MARK))
        except ValueError:
            found = None
        if found != wanted:
            raise CacheError(
                f"{target.url}: holds an export of another cache or with another --top-k",
                expected="an empty folder, or one that this command has begun",
            )


def _table(rows: list[CachedSequence], schema: pa.Schema) -> pa.Table:
    columns = [
        pa.array([row.sample_id for row in rows]),
        pa.array([row.input_ids_L for row in rows], pa.list_(pa.int32())),
        pa.array([row.loss_mask_L for row in rows], pa.list_(pa.bool_())),
        pa.array([list(_positions(row, row.targets.token_ids_E)) for row in rows],
                 pa.list_(pa.list_(pa.int32()))),
        pa.array([list(_positions(row, _logprobs(row))) for row in rows],
                 pa.list_(pa.list_(pa.float16()))),
    ]  # fmt: skip
    if len(schema) > len(columns):
        lists = [list(_positions(row, _inclusion(row))) for row in rows]
        columns.append(pa.array(lists, pa.list_(pa.list_(pa.float32()))))
    return pa.Table.from_arrays(columns, schema=schema)


def _inclusion(row: CachedSequence) -> NDArray[np.float32]:
    assert row.targets.inclusion_E is not None
    return row.targets.inclusion_E


def _logprobs(row: CachedSequence) -> NDArray[np.float16]:
    """Return log p at temperature 1; for sampled entries less the known bias of rounding."""
    targets = row.targets
    logprobs_E = targets.logprobs_E
    if targets.inclusion_E is not None and targets.sampled_step:
        bias = np.float32(rounding_log_bias(targets.sampled_step, 1.0))
        logprobs_E = np.where(targets.inclusion_E < 1, logprobs_E - bias, logprobs_E)
    return logprobs_E.astype(np.float16)


def _positions(row: CachedSequence, values_E: NDArray[np.generic]) -> Iterator[NDArray[np.generic]]:
    """Yield the values of each supervised token."""
    ends = np.cumsum(row.targets.counts_N)
    for start, end in zip(ends - row.targets.counts_N, ends, strict=True):
        yield values_E[start:end]
