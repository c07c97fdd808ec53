"""Open a cache, check it, and read rows of its shards; refuses what it cannot vouch for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache.law import SamplingLaw
from pipeline.cache.manifest import (
    SPLITS,
    Manifest,
    ShardRecord,
    checksum,
    read_manifest,
    read_rows_index,
    tokenizer_name,
)
from pipeline.cache.ranked import RankedSpec
from pipeline.cache.schema import (
    column_names,
    read_footer,
    read_spec,
    table_to_rows,
    table_to_statistics,
)
from pipeline.cache.sparse import CachedSequence, Statistics
from pipeline.cache.thin import WHOLE, Less, check_less
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = ["Cache", "SplitSource", "open_cache"]

_OPEN_SHARDS = 16


class Cache:
    """A complete cache: its manifest, row lengths and shards."""

    def __init__(self, store: Store, manifest: Manifest, rows_index_R2: NDArray[np.int32]) -> None:
        """Use `open_cache`; this only keeps the parts."""
        self.store = store
        self.manifest = manifest
        self.spec = read_spec(manifest.codec)
        self._rows_index_R2 = rows_index_R2

    @property
    def law(self) -> SamplingLaw | None:
        """How entries were drawn; None: all are certain."""
        return self.spec.law if isinstance(self.spec, RankedSpec) else None

    def source(
        self, split: str, *, top_k: int | None = None, tau_factor: float | None = None
    ) -> SplitSource:
        """Return the rows of one split (`train` or `heldout`), whole or with fewer entries.

        Args:
            split: which.
            top_k: only the largest entries of each position, of a top-k cache.
            tau_factor: thin drawn entries without bias, as if every tau had been larger by this
                factor; the same entries for everybody.

        Raises:
            CacheError: the cache holds less, or entries of the other kind.
        """
        assert split in SPLITS, split
        less = Less(top_k, tau_factor)
        held = self.manifest.identity.get("scheme", {}).get("top_k")
        check_less(less, law=self.law, held=held, url=self.store.url)
        shards = self.manifest.of_split(split)
        ordered = list(self.manifest.shards)
        starts = np.cumsum([0] + [record.rows for record in ordered])
        picked = [
            self._rows_index_R2[starts[i] : starts[i + 1]]
            for i, record in enumerate(ordered)
            if record.split == split
        ]
        index_R2 = np.concatenate(picked) if picked else np.zeros((0, 2), np.int32)
        return SplitSource(self, shards, index_R2, less)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the tokenizer's files by name, as the teacher used them.

        Raises:
            CacheError: one of them is missing or damaged.
        """
        files: dict[str, bytes] = {}
        for name, wanted in self.manifest.tokenizer_xxh3_128.items():
            try:
                files[name] = self.store.read(tokenizer_name(name))
            except FileNotFoundError:
                files[name] = b""
            if checksum(files[name]) != wanted:
                raise CacheError(
                    f"{self.store.full_url(tokenizer_name(name))}: missing or damaged",
                    do="delete _meta/manifest.json and run cache-teacher again to write it anew",
                )
        return files


class SplitSource:
    """Rows of one split; holds the compressed tables of a few shards in memory.

    Safe to use from several threads.
    """

    def __init__(
        self,
        cache: Cache,
        shards: tuple[ShardRecord, ...],
        index_R2: NDArray[np.int32],
        less: Less = WHOLE,
    ) -> None:
        """Use `Cache.source`."""
        self._cache = cache
        self._less = less
        self.shards = shards
        self._index_R2 = index_R2
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def shard_rows(self) -> Sequence[int]:
        """Return the number of rows of each shard, in order."""
        return [record.rows for record in self.shards]

    def lengths(self) -> NDArray[np.int32]:
        """Return the tokens of every row, shard after shard."""
        return self._index_R2[:, 0]

    def counted_counts(self) -> NDArray[np.int32]:
        """Return the counted tokens of every row, shard after shard."""
        return self._index_R2[:, 1]

    def read_rows(self, shard: int, rows: Sequence[int]) -> list[CachedSequence]:
        """Decode rows of one shard, in the order asked for.

        Raises:
            CacheError: the shard is missing or damaged; the message names it.
        """
        table = self._table(shard).take(pa.array(list(rows), pa.int64()))
        cache = self._cache
        try:
            return table_to_rows(table, cache.spec, cache.manifest.temperatures, self._less)
        except CacheError as error:
            raise _damaged(cache.store, self.shards[shard], error.found) from None

    def read_statistics(self, shard: int, rows: Sequence[int]) -> list[Statistics]:
        """Return what is stored of rows without their entries, which are not decoded.

        Raises:
            CacheError: the shard is missing or damaged; the message names it.
        """
        cache = self._cache
        table = self._table(shard).take(pa.array(list(rows), pa.int64()))
        try:
            return table_to_statistics(table, cache.spec, cache.manifest.temperatures)
        except CacheError as error:
            raise _damaged(cache.store, self.shards[shard], error.found) from None

    def _table(self, shard: int) -> pa.Table:
        with self._lock:
            if shard in self._tables:
                self._tables.move_to_end(shard)
                return self._tables[shard]
        table = _load(self._cache, self.shards[shard])
        with self._lock:
            self._tables[shard] = table
            while len(self._tables) > _OPEN_SHARDS:
                self._tables.popitem(last=False)
        return table


def open_cache(url: str) -> Cache:
    """Open a complete cache at a path or URL.

    Raises:
        CacheError: there is none, it is incomplete (with the missing shards), damaged, or newer.
        StoreError: the store cannot be reached.
    """
    store = Store(url)
    manifest = read_manifest(store)
    return Cache(store, manifest, read_rows_index(store, manifest))


def _load(cache: Cache, record: ShardRecord) -> pa.Table:
    try:
        data = cache.store.read(record.path)
    except FileNotFoundError:
        raise _damaged(cache.store, record, "missing") from None
    found = checksum(data)
    if found != record.xxh3_128:
        reason = f"checksum {found[:12]}..., not {record.xxh3_128[:12]}..."
        raise _damaged(cache.store, record, reason)
    try:
        table = pq.read_table(pa.BufferReader(data), columns=column_names(cache.spec))
    except (pa.ArrowException, OSError) as error:
        raise _damaged(cache.store, record, f"not readable as Parquet ({error})") from None
    footer: dict[str, Any] = read_footer(table.schema.metadata)
    if footer["identity_digest"] != cache.manifest.identity_digest:
        raise _damaged(cache.store, record, "it belongs to a cache of another identity")
    return table


def _damaged(store: Store, record: ShardRecord, reason: str) -> CacheError:
    return CacheError(
        f"{store.full_url(record.path)}: shard damaged: {reason}",
        do="run the cache-teacher command that made this cache again; it makes only this one anew",
    )
