"""What a cache knows of each row without its entries: length, surprise, entropy; counted once.

Of each shard a few columns are read, a fraction of its bytes. The result depends on the cache
alone, so it is stored in the machine's local folder under a digest of the segments, where all ranks
of a node and all later runs open it.

Shapes: R rows of a split, in the order of its shards.
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache.codec.arrow import statistics_of
from pipeline.cache.io.reader import Cache, ShardDamaged
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.errors import CacheError
from pipeline.storage.local_folder import local_folder, locked, remove_old
from pipeline.storage.parallel import default_workers, in_threads

__all__ = ["ROW_STATISTICS", "row_statistics"]

_log = logging.getLogger(__name__)

ROW_STATISTICS = {
    "tokens": "tokens of the row",
    "loss_tokens": "supervised tokens",
    "surprise": "the teacher's mean surprise at the text's supervised tokens, -log p, in nats",
    "max_surprise": "the largest one",
    "entropy": "the teacher's mean entropy there at temperature 1, in nats",
    "agreement": "share of the supervised tokens to which the teacher gives more than half",
    "sample": "a number from 0 to 1 that the sample's identity gives, for parts at random",
}
"""Names of the columns, and what they are; a row without supervised tokens has zeros."""

_VERSION = 1
_COLUMNS = ["sample_id", "loss_mask", "label_logprob", "entropy"]
_WITHOUT_READING = 2
"""Columns that the row index knows."""

Table = NDArray[np.float32]


def row_statistics(cache: Cache, split: str, names: tuple[str, ...]) -> dict[str, Table]:
    """Return columns of `ROW_STATISTICS` for every row of a split, float32 [R].

    Reads no shard where lengths alone are asked for.

    Raises:
        CacheError: a shard is missing or damaged; the message names it.
    """
    known = list(ROW_STATISTICS)
    sizes_R2 = cache.index().all_sizes(split)
    found = {name: sizes_R2[:, known.index(name)].astype(np.float32) for name in known[:2]}
    wanted = [name for name in names if name not in found]
    if wanted:
        table_RC = _stored_or_read(cache, split, len(sizes_R2))
        for name in wanted:
            found[name] = table_RC[:, known.index(name) - _WITHOUT_READING]
    return {name: found[name] for name in names}


def _stored_or_read(cache: Cache, split: str, rows: int) -> Table:
    folder = local_folder("row-statistics")
    if folder is None:
        return _read(cache, split)
    segments = [segment.xxh3_128 for segment in cache.manifest.of_split(split)]
    name = checksum("".join([str(_VERSION), split, *segments]).encode())
    file = folder / f"{name}.npy"
    with ExitStack() as held:
        try:
            held.enter_context(locked(file.with_suffix(".lock")))
        except OSError as error:  # a full disk ends no run that can do without
            _log.warning("%s cannot be written (%s): later runs read again", file, error)
            return _read(cache, split)
        stored = _load(file, rows)
        if stored is not None:
            with suppress(OSError):
                os.utime(file)
            return stored
        remove_old(folder, "*.npy", "*.partial")
        table_RC = _read(cache, split)
        partial = file.with_suffix(".partial")
        try:
            with partial.open("wb") as opened:
                np.save(opened, table_RC)
            os.replace(partial, file)
        except OSError as error:
            _log.warning("%s cannot be written (%s): later runs read again", file, error)
    return table_RC


def _load(file: Path, rows: int) -> Table | None:
    """Return a stored table, mapped; None where there is none or it is not whole."""
    try:
        found: Table = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    shape = (rows, len(ROW_STATISTICS) - _WITHOUT_READING)
    return found if found.shape == shape and found.dtype == np.float32 else None


def _read(cache: Cache, split: str) -> Table:
    shards = range(len(cache.records(split)))
    parts = in_threads(lambda shard: _of_shard(cache, split, shard), shards, default_workers())
    empty = np.zeros((0, len(ROW_STATISTICS) - _WITHOUT_READING), np.float32)
    return np.concatenate([empty, *parts])


def _of_shard(cache: Cache, split: str, shard: int) -> Table:
    record = cache.records(split)[shard]
    try:
        with cache.store.open(record.path) as file:
            table = pq.read_table(
                file, columns=_COLUMNS, use_threads=False, page_checksum_verification=True
            )
        grid = tuple(float(t) for t in cache.manifest.temperatures)
        heads, label_N, entropy_N = statistics_of(table, cache.spec.of_split(split), grid)
    except (pa.ArrowException, OSError, KeyError, CacheError) as error:
        cache.source(split).open(shard)  # says what is wrong with it, if its bytes are
        reason = f"its statistics cannot be read ({error})"
        raise ShardDamaged(cache.full_url(record.path), reason, cache_url=cache.store.url) from None
    counts_R = heads.positions_S
    each_R = np.maximum(counts_R, 1)
    owner_N = np.repeat(np.arange(len(counts_R)), counts_R)

    def mean(values_N: NDArray[np.floating]) -> NDArray[np.float64]:
        means_R: NDArray[np.float64] = np.bincount(owner_N, values_N, len(counts_R)) / each_R
        return means_R

    largest_R = np.zeros(len(counts_R))
    np.maximum.at(largest_R, owner_N, -label_N.astype(np.float64))
    sample_R = heads.keys_S().astype(np.float64) / 2.0**64
    columns = (
        mean(-label_N),
        largest_R,
        mean(entropy_N),
        mean((label_N > np.log(0.5)).astype(np.float64)),
        np.minimum(sample_R, 1 - 2.0**-24),
    )
    return np.stack(columns, axis=1).astype(np.float32)
