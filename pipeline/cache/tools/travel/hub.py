"""A complete cache to a data set on the hub, in commits; the manifest comes with the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pipeline.cache.io.reader import Cache
from pipeline.cache.layout.names import MANIFEST
from pipeline.cache.tools.travel.files import (
    CARD,
    CORPUS_FOLDERS,
    CacheFile,
    cache_files,
    read_checked,
)
from pipeline.cache.tools.travel.transfer import Travelled
from pipeline.errors import CacheError, StoreError
from pipeline.storage.hub import Digest, HubDataset

__all__ = ["push_to_hub"]

_COMMIT_FILES = 200
_COMMIT_BYTES = 512 << 20
"""In memory until they are sent; files of a local cache are read again by the hub's client."""
_COMMIT_LOCAL_BYTES = 4 << 30
_OWN = ("data/", "_meta/")
"""Where the files of a cache are; others of a data set are left alone."""


def push_to_hub(
    cache: Cache,
    target: HubDataset,
    *,
    card: bytes,
    private: bool | None = None,
    with_corpus: bool = False,
    on_start: Callable[[int], None] = lambda rows: None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Travelled:
    """Send what the data set lacks, compare all by the hub's digests, and commit the manifest.

    What an interrupted push has committed is not sent again. A file is compared with its record as
    it leaves; what has arrived is compared by the digest that the hub computes, without reading it
    back.

    Args:
        cache: the source.
        target: the data set.
        card: its README.md, with licence.
        private: of a data set that is made here; None: as the account has it.
        with_corpus: take the prepared corpus along.
        on_start: called with the rows of the cache.
        on_rows: called with rows that have arrived.

    Raises:
        CacheError: the source is damaged, or the data set holds another cache.
        StoreError: the hub refuses or fails, or holds other bytes than it was sent.
    """
    manifest = cache.store.read(MANIFEST)
    last = {CARD: card, MANIFEST: manifest}
    target.create(private=private)
    there = target.listing()
    files = list(cache_files(cache, with_corpus=with_corpus))
    _reject_another(target, there, files, manifest)
    on_start(cache.manifest.total().rows)
    digests: dict[str, Digest] = {}
    sent = moved = 0
    for batch in _batches(cache, files, there, digests, on_rows):
        target.commit(batch, f"Add {len(batch)} files of a teacher cache")
        sent += len(batch)
        moved += sum(digests[name].size for name in batch)
    arrived = target.listing()
    _compare(target, arrived, digests)
    missing = {name: data for name, data in last.items() if not _is_there(arrived, name, data)}
    if missing:
        target.commit(missing, "Complete a teacher cache")
        _compare(target, target.listing(), {n: Digest.of(data) for n, data in missing.items()})
    return Travelled(len(files), sent, moved)


def _is_there(listing: dict[str, Digest], name: str, data: bytes) -> bool:
    return Digest.of(data).fits(listing.get(name))


def _reject_another(
    target: HubDataset, there: dict[str, Digest], files: list[CacheFile], manifest: bytes
) -> None:
    known = {file.name for file in files}
    # A prepared corpus that an earlier push sent along is this cache's, if all else is.
    optional = tuple(f"{folder}/" for folder in CORPUS_FOLDERS)
    other = [
        name
        for name in there
        if name.startswith(_OWN)
        and not name.startswith(optional)
        and name not in {*known, MANIFEST}
    ]
    found = there.get(MANIFEST)
    if found is not None and not Digest.of(manifest).fits(found):
        other.insert(0, MANIFEST)
    if other:
        raise CacheError(
            f"{target.url}: holds files of another cache, such as {other[0]}",
            expected="an empty data set, or one that the same command has begun",
            do="choose another data set or folder, or delete those files",
        )


def _batches(
    cache: Cache,
    files: list[CacheFile],
    there: dict[str, Digest],
    digests: dict[str, Digest],
    on_rows: Callable[[int], None],
) -> Iterator[dict[str, bytes | str]]:
    """Yield the files that are not there, as many as a commit takes; note all digests."""
    local = cache.store.is_local
    most = _COMMIT_LOCAL_BYTES if local else _COMMIT_BYTES
    batch: dict[str, bytes | str] = {}
    size = rows = 0
    for file in files:
        data = read_checked(cache.store, file)
        digest = digests[file.name] = Digest.of(data)
        if digest.fits(there.get(file.name)):
            on_rows(file.rows)
            continue
        if batch and (size + len(data) > most or len(batch) >= _COMMIT_FILES):
            yield batch
            on_rows(rows)
            batch, size, rows = {}, 0, 0
        batch[file.name] = cache.store.path(file.name) if local else data
        size, rows = size + len(data), rows + file.rows
    if batch:
        yield batch
        on_rows(rows)


def _compare(target: HubDataset, arrived: dict[str, Digest], digests: dict[str, Digest]) -> None:
    wrong = [name for name, digest in digests.items() if not digest.fits(arrived.get(name))]
    if wrong:
        raise StoreError(
            f"{target.url}: {len(wrong)} files are not there as they were sent, such as {wrong[0]}",
            do="run the same command again; it sends what is not there",
        )
