"""The files that make up a complete cache, each with what its bytes must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.cache.io.reader import Cache
from pipeline.cache.io.segments import iter_records
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.names import (
    CARD,
    ENVIRONMENT,
    PLAN,
    RESPONSE_UNITS,
    RESPONSES,
    tokenizer_name,
)
from pipeline.cache.layout.quarantine import QUARANTINE
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = ["CARD", "CORPUS_FOLDERS", "CacheFile", "cache_files", "read_checked"]

_SETTINGS = ("_meta/config.yaml", "_meta/fitted_tau.json", PLAN, ENVIRONMENT)
CORPUS_FOLDERS = ("_meta/corpus", RESPONSE_UNITS)
"""Prepared samples, which only stage one reads."""
_READS = 2
"""A bit flipped in transfer is right at the second read; one flipped on the disk is not."""


@dataclass(frozen=True, slots=True)
class CacheFile:
    """One file of a cache, but for its card and its manifest."""

    name: str
    """Relative to the cache."""
    xxh3_128: str
    """As the manifest or a record says; empty where the bytes at the source decide."""
    size: int | None = None
    rows: int = 0
    """Of a shard."""


def cache_files(cache: Cache, *, with_corpus: bool = False) -> Iterator[CacheFile]:
    """Yield the files of a cache: the small ones first, then the shards.

    Left behind are leases, backups of a repair and stray files; the prepared corpus, which only
    stage one reads, unless it is asked for.

    Raises:
        CacheError: a segment of records is missing or damaged.
        StoreError: the store fails.
    """
    store, manifest = cache.store, cache.manifest
    for segment in manifest.segments:
        yield CacheFile(segment.path, segment.xxh3_128, segment.segment_bytes)
    for name, digest in manifest.tokenizer_xxh3_128.items():
        yield CacheFile(tokenizer_name(name), digest)
    there = set(store.list("_meta"))
    for name in _SETTINGS:
        if name.removeprefix("_meta/") in there:
            yield CacheFile(name, "")
    for folder in (QUARANTINE, RESPONSES):
        yield from _below(store, folder, deep=False)
    if with_corpus:
        for folder in CORPUS_FOLDERS:
            yield from _below(store, folder, deep=True)
    for record in iter_records(store, manifest, columns=()):
        yield CacheFile(record.path, record.xxh3_128, record.bytes, record.rows)


def read_checked(store: Store, file: CacheFile) -> bytes:
    """Return a file's bytes, compared with its checksum where one is known.

    Raises:
        CacheError: missing, or not as recorded.
        StoreError: the store fails.
    """
    for _ in range(_READS):
        try:
            data = store.read(file.name, large=True)
        except FileNotFoundError:
            raise CacheError(
                f"{store.full_url(file.name)}: missing", do="verify the cache, and repair it first"
            ) from None
        if not file.xxh3_128 or checksum(data) == file.xxh3_128:
            return data
    raise CacheError(
        f"{store.full_url(file.name)}: damaged (its checksum is not the recorded one)",
        do="verify the cache, and repair it first",
    )


def _below(store: Store, folder: str, *, deep: bool) -> Iterator[CacheFile]:
    for name, size in sorted(store.sizes(folder).items()):
        yield CacheFile(f"{folder}/{name}", "", size)
    for name in store.folders(folder) if deep else ():
        yield from _below(store, f"{folder}/{name}", deep=True)
