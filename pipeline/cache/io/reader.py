"""Open a cache and read rows of its shards; every file's checksum is checked before it is used."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cache.codec.subsample import ALL_ENTRIES, EntryLimit, as_top_k, check_limit
from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.local_copies import LocalCopies
from pipeline.cache.io.parquet import parquet_table
from pipeline.cache.io.row_index import RowIndex, open_row_index
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.manifest import Manifest, read_manifest
from pipeline.cache.layout.names import MANIFEST, SPLITS, repair_advice, tokenizer_name
from pipeline.cache.layout.records import ShardRecord
from pipeline.cache.layout.schema import column_names, read_footer, read_spec, table_to_rows
from pipeline.errors import CacheError, StoreError
from pipeline.sampling.inclusion import InclusionRule
from pipeline.storage import Store

__all__ = ["Cache", "ShardDamaged", "SplitSource", "open_cache"]

_OPEN_SHARDS = 16
"""Shards kept in memory, in their compressed form, until `keep` says which."""
_UNASKED = 4
"""Room for shards that a thread was reading when others were asked for; the next `keep` drops
them."""
_ROWS_DECODED = 64
"""Rows decoded at a time where all are read in order."""
_READS = 2
"""A bit flipped in transfer is right at the second read; one flipped on the disk is not."""


class ShardDamaged(CacheError):
    """A shard that is missing, or whose bytes are not those of the manifest."""

    def __init__(self, url: str, reason: str, *, cache_url: str) -> None:
        """Name the shard, what is wrong with it, and the cache to repair."""
        self.reason = reason
        super().__init__(f"{url}: shard damaged: {reason}", do=repair_advice(cache_url))


class Cache:
    """A complete cache: its manifest, row lengths and shards."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        """Use `open_cache` instead."""
        self.store = store
        self.manifest = manifest
        self.spec = read_spec(manifest.codec)
        self.copies: LocalCopies | None = None
        """Local copies of the shards that have been read; None reads them from the store each
        time."""
        self._index: RowIndex | None = None
        self._lock = threading.Lock()

    def index(self) -> RowIndex:
        """Return the records' lines and the row lengths; read at the first call.

        Raises:
            CacheError: a segment of records is missing or damaged.
            StoreError: the store fails.
        """
        with self._lock:
            if self._index is None:
                self._index = open_row_index(self.store, self.manifest)
            return self._index

    def records(self, split: str | None = None) -> Sequence[ShardRecord]:
        """Return the records of a split by index, or those of the cache; without their rows.

        Raises:
            CacheError: a segment of records is missing or damaged.
        """
        if split is not None:
            return self.index().lines(split)
        return [record for name in SPLITS for record in self.index().lines(name)]

    @property
    def rule(self) -> InclusionRule | None:
        """How entries were sampled; None: all are always kept."""
        return self.spec.rule

    @property
    def heldout_rule(self) -> InclusionRule | None:
        """The same of the held-out rows, whose KL is unbiased with one and a bound without."""
        return self.spec.of_split("heldout").rule

    def full_url(self, path: str) -> str:
        """Return the address of a file of the cache."""
        return self.store.full_url(path)

    def source(
        self,
        split: str,
        *,
        top_k: int | None = None,
        tau_factor: float | None = None,
    ) -> SplitSource:
        """Return the rows of one split (`train` or `heldout`), with all or fewer entries.

        Args:
            split: its name.
            top_k: only the largest entries of each position, of a top-k cache; where its held-out
                rows are sampled, of those as a top-k.
            tau_factor: subsample sampled entries without bias, as if every tau had been larger by
                this factor; every reader gets the same entries.

        Raises:
            CacheError: the cache holds fewer, or entries of the other kind; a segment of records is
                missing or damaged.
        """
        assert split in SPLITS, split
        limit = EntryLimit(top_k, tau_factor)
        held = self.manifest.identity.get("scheme", {}).get("top_k")
        check_limit(limit, rule=self.rule, held=held, url=self.store.url)
        if top_k is not None and self.spec.of_split(split).rule is not None:
            return SplitSource(self, split, ALL_ENTRIES, as_top_k=top_k)
        return SplitSource(self, split, limit)

    def rows(
        self, split: str = "train", *, top_k: int | None = None, tau_factor: float | None = None
    ) -> Iterator[CachedSequence]:
        """Yield the rows of a split in the order of the files, decoded, as numpy arrays.

        A shard is in memory at a time. The arguments are those of `source`.

        Raises:
            CacheError: as in `source`; a shard is missing or damaged.
            StoreError: the store fails.
        """
        source = self.source(split, top_k=top_k, tau_factor=tau_factor)
        for shard, rows in enumerate(source.shard_rows()):
            source.keep([shard])
            for start in range(0, rows, _ROWS_DECODED):
                yield from source.read_rows(shard, range(start, min(rows, start + _ROWS_DECODED)))

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
                    do=repair_advice(self.store.url),
                )
        return files


class SplitSource:
    """Rows of one split; holds the compressed tables of a few shards in memory.

    Safe to use from several threads.
    """

    def __init__(
        self, cache: Cache, split: str, limit: EntryLimit, *, as_top_k: int | None = None
    ) -> None:
        """Use `Cache.source`."""
        self._spec = cache.spec.of_split(split)
        self._as_top_k = as_top_k
        self._cache = cache
        self._split = split
        self._less = limit
        self._open_shards = _OPEN_SHARDS
        self._loading: dict[int, Future[pa.Table]] = {}
        self._index = cache.index()
        self.shards = self._index.lines(split)
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def shard_rows(self) -> Sequence[int]:
        """Return the number of rows of each shard, in order."""
        rows: list[int] = self.shards.rows().tolist()
        return rows

    def shard_name(self, shard: int) -> str:
        """Return the name of a shard in the cache."""
        return self.shards[shard].path

    def shard_sizes(self, shard: int) -> NDArray[np.int32]:
        """Return tokens and supervised tokens of each row of a shard, int32 [rows, 2].

        Of a large cache a view of a file that the node's processes share; not to be written to.
        """
        return self._index.sizes(self._split, shard)

    def lengths(self) -> NDArray[np.int32]:
        """Return the tokens of every row, shard after shard; for callers that need all of them."""
        return self._index.all_sizes(self._split)[:, 0]

    def loss_token_counts(self) -> NDArray[np.int32]:
        """Return the supervised tokens of every row, shard after shard."""
        return self._index.all_sizes(self._split)[:, 1]

    def keep(self, shards: Collection[int]) -> None:
        """Keep these shards in memory once they are read, and let go of all others."""
        with self._lock:
            self._open_shards = len(shards) + _UNASKED
            for shard in [shard for shard in self._tables if shard not in shards]:
                del self._tables[shard]

    def read_rows(self, shard: int, rows: Sequence[int]) -> list[CachedSequence]:
        """Decode rows of one shard, in the requested order.

        Raises:
            ShardDamaged: the shard is missing or damaged; the message names it.
            StoreError: the store fails.
        """
        table = self._table(shard).take(pa.array(list(rows), pa.int64()))
        cache = self._cache
        try:
            found = table_to_rows(table, self._spec, cache.manifest.temperatures, self._less)
        except CacheError as error:
            raise _damaged(cache.store, self.shards[shard], error.found) from None
        if self._as_top_k is None:
            return found
        return [replace(row, targets=as_top_k(row.targets, self._as_top_k)) for row in found]

    def open(self, shard: int) -> None:
        """Read a shard into memory unless it is there; for reading ahead in a thread.

        Raises:
            ShardDamaged: the shard is missing or damaged; the message names it.
            StoreError: the store fails.
        """
        self._table(shard)

    def reading(self) -> list[str]:
        """Return the URLs of the shards that are being read from the store at this moment."""
        store = self._cache.store
        with self._lock:
            return [store.full_url(self.shards[shard].path) for shard in self._loading]

    def _table(self, shard: int) -> pa.Table:
        with self._lock:
            if shard in self._tables:
                self._tables.move_to_end(shard)
                return self._tables[shard]
            loading = self._loading.get(shard)
            if loading is None:
                self._loading[shard] = mine = Future[pa.Table]()
        if loading is not None:
            return loading.result()
        try:
            table = _load(self._cache, self.shards[shard])
        except BaseException as error:
            with self._lock:
                del self._loading[shard]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._loading[shard]
            self._tables[shard] = table
            while len(self._tables) > self._open_shards:
                self._tables.popitem(last=False)
        mine.set_result(table)
        return table


def open_cache(url: str) -> Cache:
    """Open a complete cache at a path or URL: its manifest, by one request.

    Raises:
        CacheError: there is none, it is incomplete (with the missing shards), damaged, or newer.
        StoreError: the store cannot be reached.
    """
    store = Store(url)
    return Cache(store, read_manifest(store))


def _load(cache: Cache, record: ShardRecord) -> pa.Table:
    for _ in range(_READS):
        try:
            data = _read(cache, record)
        except FileNotFoundError:
            if not cache.store.exists(MANIFEST):
                # The mount is gone. Without this check a run that may skip damaged shards would
                # skip one after the other.
                raise StoreError(
                    f"{cache.store.url}: the cache no longer exists at this address",
                    do="mount or restore it, then run the same command again",
                ) from None
            raise _damaged(cache.store, record, "missing") from None
        found = checksum(data)
        if found == record.xxh3_128:
            break
    else:
        reason = f"checksum {found[:12]}..., not {record.xxh3_128[:12]}..."
        raise _damaged(cache.store, record, reason)
    try:
        table = parquet_table(data, column_names(cache.spec.of_split(record.split)))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise _damaged(cache.store, record, f"not readable as Parquet ({error})") from None
    footer: dict[str, Any] = read_footer(table.schema.metadata)
    if cache.manifest.shard_identity not in (None, footer["identity_digest"]):
        raise _damaged(cache.store, record, "it belongs to a cache of another identity")
    # Taking rows out of a column of several row groups copies the column: 15 ms instead of 0.15
    # for 7 rows of 4,000 in eight groups.
    return table.combine_chunks()


def _read(cache: Cache, record: ShardRecord) -> bytes:
    if cache.copies is None:
        return cache.store.read(record.path, large=True)
    return cache.copies.read(record.xxh3_128, lambda: cache.store.read(record.path, large=True))


def _damaged(store: Store, record: ShardRecord, reason: str) -> ShardDamaged:
    return ShardDamaged(store.full_url(record.path), reason, cache_url=store.url)
