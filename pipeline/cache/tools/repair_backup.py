"""What a repair backs up below `_meta/repair`, and how it comes back where the repair fails."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from pipeline.cache.layout.inventory import read_inventory
from pipeline.cache.layout.manifest import read_manifest
from pipeline.cache.layout.names import MANIFEST, RECORDS, RESPONSES, parse_segment
from pipeline.config import fingerprint
from pipeline.storage import Store

__all__ = [
    "CONFIG",
    "REWRITTEN",
    "forget",
    "is_interrupted",
    "keep",
    "keep_responses",
    "put_back",
    "remove",
    "restore",
]

CONFIG = "_meta/config.yaml"
_KEPT = "_meta/repair"
_MANIFEST_KEPT = f"{_KEPT}/manifest.json"
_IDENTITY_KEPT = f"{_KEPT}/identity"
"""The fingerprint of the identity of the cache that the backups are of."""
_KEPT_RESPONSES = "responses-"
"""Begins the names of the backups of responses."""
REWRITTEN = ("README.md", CONFIG)
"""Stage one writes these again, with the command and the address of the repair."""


def is_interrupted(store: Store) -> bool:
    """Whether an interrupted repair has left backups that are not restored."""
    return _lacks_manifest(store) or bool(_rewritten(store))


def restore(store: Store) -> None:
    """Restore what an interrupted repair backed up: manifest, records, and what was rewritten.

    A repair can be killed before stage one, during it, or after it has written a whole cache with
    the configuration and the card of the repair.
    """
    if not is_interrupted(store):
        return
    identity = read_inventory(store).identity
    if identity is not None and _identity_kept(store) not in (
        None,
        *map(fingerprint, (identity, None)),
    ):
        forget(store)  # the folder was emptied and used for another cache
        return
    for file, data in _rewritten(store).items():
        store.write(file, data)
    if _lacks_manifest(store):
        _restore(store)


def keep(store: Store, make: Sequence[tuple[str, int]]) -> dict[str, bytes]:
    """Back up what will be rewritten; backups of an interrupted repair are older and stay.

    Returns:
        The backups by the names of what they are of; those of records stay in the store.
    """
    kept: dict[str, bytes] = {}
    whole = read_inventory(store).manifest is not None
    named = [item for item in map(parse_segment, store.list(RECORDS)) if item is not None]
    touched = {
        item.path
        for item in named
        if any(split == item.split and index in item.shards for split, index in make)
    }
    store.create(_IDENTITY_KEPT, fingerprint(read_inventory(store).identity).encode())
    # The manifest last: where its copy is, those of the records are too.
    records = sorted(touched) if whole else []
    for file in (*REWRITTEN, *records, *((MANIFEST,) if whole else ())):
        copy = _copy(file)
        with contextlib.suppress(FileNotFoundError):
            store.create(copy, store.read(file))
            if file not in touched:
                kept[file] = store.read(copy)
    return kept


def keep_responses(store: Store, names: Sequence[str]) -> None:
    """Back up the damaged ones that go: most of their text can still be read."""
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder == RESPONSES:
            with contextlib.suppress(FileNotFoundError):
                store.create(f"{_KEPT}/{_KEPT_RESPONSES}{file}", store.read(name))


def put_back(store: Store, removed: Mapping[str, bytes]) -> None:
    """Restore the cache, except for the shards and responses that stage one has written.

    The copies of `REWRITTEN` go, so that who edits the configuration after a failure (another
    place of the teacher) does not get the old one back.
    """
    for name, data in removed.items():
        store.create(name, data)
    for file in store.list(_KEPT):
        if file.startswith(_KEPT_RESPONSES):
            name = f"{RESPONSES}/{file.removeprefix(_KEPT_RESPONSES)}"
            store.create(name, store.read(f"{_KEPT}/{file}"))
    for file, data in _rewritten(store).items():
        store.write(file, data)
    store.delete_all([_copy(file) for file in REWRITTEN])
    if not store.exists(MANIFEST):
        _restore(store)


def remove(store: Store, names: Sequence[str]) -> dict[str, bytes]:
    """Remove files; return the small ones by name, for `put_back`."""
    removed: dict[str, bytes] = {}
    for name in names:
        if not name.endswith(".parquet"):
            with contextlib.suppress(FileNotFoundError):
                removed[name] = store.read(name)
        store.delete(name)
    return removed


def forget(store: Store) -> None:
    """Remove the backups, after a repair that has succeeded."""
    store.delete_all([f"{_KEPT}/{file}" for file in store.list(_KEPT)])


def _copy(file: str) -> str:
    return f"{_KEPT}/{file.rsplit('/', 1)[-1]}"


def _lacks_manifest(store: Store) -> bool:
    return not store.exists(MANIFEST) and store.exists(_MANIFEST_KEPT)


def _rewritten(store: Store) -> dict[str, bytes]:
    """Return the backups that differ from the files they are of, by the names of those."""
    found = {}
    for file in REWRITTEN:
        with contextlib.suppress(FileNotFoundError):
            data = store.read(_copy(file))
            if not store.exists(file) or store.read(file) != data:
                found[file] = data
    return found


def _identity_kept(store: Store) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        return store.read(_IDENTITY_KEPT).decode()
    return None


def _restore(store: Store) -> None:
    """Write the backed up records, and then the manifest, where they were."""
    for file in store.list(_KEPT):
        if parse_segment(file) is not None:
            store.write(f"{RECORDS}/{file}", store.read(f"{_KEPT}/{file}"))
    if not _lacks_manifest(store):
        return
    store.create(MANIFEST, store.read(_MANIFEST_KEPT))
    listed = {segment.path for segment in read_manifest(store).segments}
    named = [item for item in map(parse_segment, store.list(RECORDS)) if item is not None]
    # What `reopen` wrote in their place, and what stage one has recorded since.
    store.delete_all([item.path for item in named if item.path not in listed])
