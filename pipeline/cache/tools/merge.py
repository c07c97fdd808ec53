"""Join caches: parts of one identity by checksum, or complete caches of several teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cache.io.reader import Cache, open_cache
from pipeline.cache.io.segments import RecordReader, iter_records
from pipeline.cache.io.tables import read_shard
from pipeline.cache.layout.inventory import (
    Inventory,
    Plan,
    PlannedRows,
    encode_plan,
    read_inventory,
)
from pipeline.cache.layout.manifest import describe_difference
from pipeline.cache.layout.names import SPLITS, repair_advice
from pipeline.cache.layout.records import ShardRecord
from pipeline.cache.tools.checking.sample_ids import Repeats, SampleIds
from pipeline.cache.tools.derive import check_apart, fill, finish, reserve_folder
from pipeline.cache.tools.merge_partial import merge_parts
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = ["joined_members", "merge_caches"]

_Progress = Callable[[int], None]


def merge_caches(
    target: Store,
    urls: Sequence[str],
    *,
    command: str,
    workers: int = 1,
    on_start: _Progress = lambda rows: None,
    on_rows: _Progress = lambda rows: None,
) -> int:
    """Write the rows of several caches to `target`; return their number.

    Sources of one identity (workers that wrote to different stores): the union of their intact
    shards, byte for byte; the cache is finished when none is missing. Sources of several
    identities, all of one tokenizer, codec, scheme and temperature grid: all shards in the order of
    `urls`, byte for byte too. A sample may then occur once per source.

    Raises:
        CacheError: the sources do not fit together (everything that differs, at once), shards are
            missing or damaged, or the target cannot be used.
    """
    sources = [Store(url) for url in urls]
    if len({store.place for store in sources}) < len(sources):
        raise CacheError("a cache is named twice", expected="different caches to merge")
    check_apart(target, sources)
    inventories = [read_inventory(store) for store in sources]
    unknown = [
        s.url for s, inventory in zip(sources, inventories, strict=True) if not inventory.identity
    ]
    if unknown:
        raise CacheError(
            f"{', '.join(unknown)}: manifest and plan are damaged, so its content is unknown",
            do=repair_advice(unknown[0]),
        )
    if len({inventory.identity_digest for inventory in inventories}) == 1:
        return merge_parts(
            target,
            sources,
            inventories,
            command=command,
            workers=workers,
            on_start=on_start,
            on_rows=on_rows,
        )
    caches = _open_all(sources, inventories)
    return _append(
        target, caches, command=command, workers=workers, on_start=on_start, on_rows=on_rows
    )


def _open_all(sources: Sequence[Store], inventories: Sequence[Inventory]) -> list[Cache]:
    """Open complete caches of several identities; report all incompatibilities at once."""
    mistakes: list[str] = []
    caches: list[Cache] = []
    digests = [inventory.identity_digest for inventory in inventories]
    for store, inventory in zip(sources, inventories, strict=True):
        if digests.count(inventory.identity_digest) > 1:
            mistakes.append(f"{store.url}: has the same identity as another; merge these two first")
        try:
            caches.append(open_cache(store.url))
        except CacheError as error:
            mistakes.append(error.found)
    for cache in caches[1:]:
        difference = describe_difference(_common(cache), _common(caches[0]), limit=99)
        if difference:
            mistakes.append(f"{cache.store.url}: {difference} by {caches[0].store.url}")
    if mistakes:
        raise CacheError(
            "the caches cannot be merged:\n  - " + "\n  - ".join(mistakes) + "\n",
            expected="complete caches of one tokenizer, codec, scheme and temperature grid",
            do="`slice --top-k` makes the numbers of entries equal",
        )
    return caches


def _common(cache: Cache) -> dict[str, Any]:
    """Return what must be equal in all sources, because rows do not carry it."""
    identity = cache.manifest.identity
    return {
        "tokenizer": identity["tokenizer"],
        "codec": cache.manifest.codec,
        "scheme": identity["scheme"],
        "temperatures": list(cache.manifest.temperatures),
    }


@dataclass(frozen=True, slots=True)
class _Part:
    """A shard of a source, and its place in the joined cache."""

    cache: int
    source: int
    """Its index there."""
    planned: PlannedRows


def _append(
    target: Store,
    caches: Sequence[Cache],
    *,
    command: str,
    workers: int,
    on_start: _Progress,
    on_rows: _Progress,
) -> int:
    """Copy every shard, byte for byte: what a shard says does not depend on its neighbours."""
    parts, repeats = _places(caches)
    both = sum(repeats.across.values())
    if both:
        raise CacheError(
            f"{both} samples are held out in one cache and trained on in another",
            expected="samples on the same side everywhere; a student would be measured on what it "
            "was trained on",
            do="build the caches with the same seed and --corpus.heldout_fraction, or leave those "
            "samples out with `slice`",
        )
    identity = _joined_identity(caches, repeats.rows)
    shards = [part.planned for part in parts]
    plan = Plan(identity, tuple(shards))
    tokenizer = caches[0].tokenizer_files()
    reserve_folder(target, plan, encode_plan(plan))
    records = [RecordReader(cache.store, cache.manifest) for cache in caches]

    def make(place: int) -> tuple[ShardRecord, bytes]:
        part = parts[place]
        item, store = part.planned, caches[part.cache].store
        record = records[part.cache].read(item.split, part.source)
        try:
            data = read_shard(store, record)
        except CacheError as error:
            raise CacheError(
                f"{store.full_url(record.path)}: shard damaged: {error.found}",
                do=repair_advice(store.url),
            ) from None
        return record.moved(item.split, item.index), data

    rows = sum(item.rows for item in shards)
    on_start(rows)
    fill(target, shards, make, on_rows, workers=workers)
    finish(
        target,
        shards,
        identity=identity,
        spec=caches[0].spec,
        temperatures=caches[0].manifest.temperatures,
        tokenizer=tokenizer,
        corpus_counts=None,
        corpus_content=fingerprint([cache.manifest.corpus_content for cache in caches]),
        command=command,
    )
    return rows


def _places(caches: Sequence[Cache]) -> tuple[list[_Part], Repeats]:
    """Return the shards of the joined cache, and which samples occur again, from the records."""
    parts: list[_Part] = []
    ids = SampleIds()
    for split in SPLITS:
        index = 0
        for number, cache in enumerate(caches):
            for record in iter_records(cache.store, cache.manifest, split):
                digest = fingerprint(record.sample_ids())
                planned = PlannedRows(split, index, record.rows, record.tokens, digest)
                ids.add(record.row_ids, len(parts))
                parts.append(_Part(number, record.index, planned))
                index += 1
    trained = sum(part.planned.split == "train" for part in parts)
    return parts, ids.repeats(trained)


def _joined_identity(caches: Sequence[Cache], repeated: int) -> dict[str, Any]:
    first = caches[0].manifest.identity
    derived: dict[str, Any] = {
        "from": [cache.manifest.identity_digest for cache in caches],
        "how": {"command": "merge"},
    }
    if repeated:
        derived["repeated_samples"] = repeated
    identities = [cache.manifest.identity for cache in caches]
    return {
        **first,
        "teacher": joined_members([identity["teacher"] for identity in identities]),
        "corpus": joined_members([identity["corpus"] for identity in identities]),
        "shard_tokens": max(int(identity["shard_tokens"]) for identity in identities),
        "derived": derived,
    }


def joined_members(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join several objects: equal members once, the largest of numbers, else a list of all.

    Readers use the teacher's name and the corpus's `max_length`; both keep their meaning.
    """
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = list(_distinct(part[name] for part in parts if name in part))
        if len(values) == 1:
            joined[name] = values[0]
        elif all(isinstance(value, int | float) for value in values):
            joined[name] = max(values)
        elif all(isinstance(value, str | None) for value in values):
            joined[name] = " + ".join(str(value) for value in values)
        else:
            joined[name] = values
    return joined


def _distinct(values: Iterator[Any]) -> Iterator[Any]:
    seen: list[str] = []
    for value in values:
        if fingerprint(value) not in seen:
            seen.append(fingerprint(value))
            yield value
