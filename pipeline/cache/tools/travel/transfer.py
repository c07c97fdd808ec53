"""A complete cache from one store to another: resumed, compared on arrival, the manifest last."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.cache.io.reader import Cache
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.manifest import describe_difference, read_manifest
from pipeline.cache.layout.names import MANIFEST, PLAN, RECORDS
from pipeline.cache.tools.derive import check_apart
from pipeline.cache.tools.travel.files import CARD, CacheFile, cache_files, read_checked
from pipeline.errors import CacheError, StoreError
from pipeline.storage import Store
from pipeline.storage.parallel import in_threads

__all__ = ["Travelled", "transfer"]

_MARK = "_meta/transfer.json"
"""Whose files a folder without a manifest holds; gone once the manifest is there."""
_WRITES = 2
"""What arrives otherwise than it left is sent once more."""


@dataclass(frozen=True, slots=True)
class Travelled:
    """What a transfer has done."""

    files: int
    sent: int
    """Files that were not there yet."""
    bytes: int
    """Of these."""


def transfer(
    cache: Cache,
    target: Store,
    *,
    card: bytes | None = None,
    check: str = "checksum",
    with_corpus: bool = False,
    workers: int = 1,
    on_start: Callable[[int], None] = lambda rows: None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Travelled:
    """Copy a cache; the same command again sends what is missing, and replaces what differs.

    Every file is compared with its recorded checksum as it leaves and, read back, as it has
    arrived. Until all have, the target has no manifest, so no reader takes it for a cache.

    Args:
        cache: the source.
        target: its new folder, empty or begun by the same command.
        card: its README.md there; None copies the source's.
        check: `size` trusts the target's sizes and reads nothing back.
        with_corpus: take the prepared corpus along.
        workers: files under way at one time.
        on_start: called with the rows of the cache.
        on_rows: called with rows that have arrived.

    Raises:
        CacheError: the source is damaged, or the target is the source or holds another cache.
        StoreError: a store fails, or keeps other bytes than it was sent.
    """
    check_apart(target, [cache.store])
    manifest = cache.store.read(MANIFEST)
    card = _read(cache.store, CARD) if card is None else card
    _reserve(cache, target, manifest)
    files = list(cache_files(cache, with_corpus=with_corpus))
    sizes = _sizes(target, files)
    on_start(cache.manifest.total().rows)
    bring = partial(_bring, cache.store, target, sizes, check == "checksum")
    sent = moved = 0
    for file, size in zip(files, in_threads(bring, files, workers), strict=True):
        sent += size is not None
        moved += size or 0
        on_rows(file.rows)
    if card is not None and _read(target, CARD) != card:
        target.write(CARD, card)
    if _read(target, MANIFEST) != manifest:
        target.write(MANIFEST, manifest)
        if target.read(MANIFEST) != manifest:
            raise _kept_otherwise(target, MANIFEST)
    target.delete(_MARK)
    return Travelled(len(files), sent, moved)


def _reserve(cache: Cache, target: Store, manifest: bytes) -> None:
    """Reject a folder with another cache, complete, begun or under way."""
    found = _read(target, MANIFEST)
    if found is not None and found != manifest:
        theirs = read_manifest(target).identity
        difference = describe_difference(theirs, cache.manifest.identity) or "other shards"
        raise _held(target, difference)
    # The digest covers the identity and the checksums of all shards.
    mark = json.dumps({"manifest_xxh3_128": checksum(manifest)}).encode()
    there = _read(target, _MARK)
    begun = found is None and (target.exists(PLAN) or bool(target.list(RECORDS)))
    if there is None and begun:
        raise _held(target, "unfinished")
    if there is None:  # of a complete one as well: to replace a file its manifest goes meanwhile
        target.create(_MARK, mark)
        there = target.read(_MARK)
    if there != mark:
        raise _held(target, "a transfer of another one has begun")


def _held(target: Store, difference: str) -> CacheError:
    return CacheError(
        f"{target.url}: holds another cache ({difference})",
        expected="an empty folder, or one that the same command has begun",
        do="choose another target, or delete that cache",
    )


def _sizes(target: Store, files: Sequence[CacheFile]) -> dict[str, int]:
    """Return the sizes of what is at the target already, by one listing of each folder."""
    folders = dict.fromkeys(file.name.rpartition("/")[0] for file in files)
    return {
        f"{folder}/{name}": size
        for folder in folders
        for name, size in target.sizes(folder).items()
    }


def _bring(
    source: Store, target: Store, sizes: Mapping[str, int], compared: bool, file: CacheFile
) -> int | None:
    """Send a file unless it is there; return its size, None where it was."""
    data = None
    if not file.xxh3_128 or file.size is None:
        data = read_checked(source, file)  # small: its size and checksum are its own
    wanted = checksum(data) if data is not None else file.xxh3_128
    size = len(data) if data is not None else file.size
    if sizes.get(file.name) == size and (
        not compared or checksum(_read(target, file.name) or b"") == wanted
    ):
        return None
    if data is None:
        data = read_checked(source, file)
    if sizes.get(file.name) is not None and target.exists(MANIFEST):
        target.delete(MANIFEST)  # while a file is replaced the cache must not appear complete
    for _ in range(_WRITES):
        target.write(file.name, data)
        if not compared or checksum(_read(target, file.name) or b"") == wanted:
            return len(data)
    raise _kept_otherwise(target, file.name)


def _kept_otherwise(target: Store, name: str) -> StoreError:
    return StoreError(
        f"{target.full_url(name)}: what is there is not what was sent",
        expected="a store that keeps bytes as they are",
        do="check the disk or the store, then run the same command again",
    )


def _read(store: Store, name: str) -> bytes | None:
    try:
        return store.read(name, large=True)
    except FileNotFoundError:
        return None
