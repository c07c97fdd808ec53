"""Caches put together: parts of one identity by checksum, or whole caches of several teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec import CodecSpec
from pipeline.cache.derive import check_apart, claim_folder, derived_counts, fill, finish
from pipeline.cache.ledger import Ledger, Plan, PlannedRows, decode_plan, encode_plan, read_ledger
from pipeline.cache.manifest import (
    SPLITS,
    ShardRecord,
    checksum,
    decode_record,
    describe_difference,
    record_name,
    tokenizer_name,
)
from pipeline.cache.parallel import in_threads
from pipeline.cache.reader import Cache, open_cache
from pipeline.cache.tables import encode_table, read_shard, read_table, short_ids
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = ["merge_caches"]

_CONFIG = "_meta/config.yaml"
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
    """Write the sum of several caches to `target`; return its rows.

    Of one identity (workers that wrote to different stores): the union of their intact shards, byte
    for byte; finished when none is missing. Of several identities, all of one tokenizer, codec,
    scheme and temperature grid: all rows, shard after shard in the order of `urls`, the columns as
    they are. A sample may then occur once in each source.

    Raises:
        CacheError: the sources do not fit together (everything that differs, at once), shards are
            missing or damaged, or the target is no place for it.
    """
    sources = [Store(url) for url in urls]
    if len({store.root for store in sources}) < len(sources):
        raise CacheError("a cache is named twice", expected="different caches to merge")
    check_apart(target, sources)
    ledgers = [read_ledger(store) for store in sources]
    unknown = [s.url for s, ledger in zip(sources, ledgers, strict=True) if not ledger.identity]
    if unknown:
        raise CacheError(
            f"{', '.join(unknown)}: manifest and plan are damaged, so nobody knows what is in it",
            do="repair it first",
        )
    if len({ledger.identity_digest for ledger in ledgers}) == 1:
        parts = _Parts(sources, ledgers)
        return _unite(target, parts, command=command, on_start=on_start, on_rows=on_rows)
    caches = _open_all(sources, ledgers)
    return _append(
        target, caches, command=command, workers=workers, on_start=on_start, on_rows=on_rows
    )


@dataclass(frozen=True, slots=True)
class _Parts:
    """Caches of one identity, finished or not."""

    stores: Sequence[Store]
    ledgers: Sequence[Ledger]

    @property
    def whole(self) -> Ledger | None:
        """The first that has a manifest."""
        return next((ledger for ledger in self.ledgers if ledger.manifest), None)

    def plan(self) -> tuple[Plan, bytes]:
        """Return the plan and its file, as the stage wrote it where one has it."""
        for ledger in self.ledgers:
            plan = decode_plan(ledger.plan_raw) if ledger.plan_raw else None
            if plan is not None and ledger.plan_raw is not None:
                return plan, ledger.plan_raw
        assert self.whole is not None
        assert self.whole.identity is not None
        shards = [
            PlannedRows(record.split, record.index, record.rows, record.tokens, None)
            for record in self.whole.records
        ]
        plan = Plan(self.whole.identity, tuple(shards))
        return plan, encode_plan(plan)

    def tokenizer(self) -> dict[str, bytes]:
        """Return the tokenizer's files, by the manifest's checksums where there is a manifest."""
        for store, ledger in zip(self.stores, self.ledgers, strict=True):
            names = ledger.manifest.tokenizer_xxh3_128 if ledger.manifest else {}
            names = names or dict.fromkeys(store.list("_meta/tokenizer"), "")
            try:
                files = {name: store.read(tokenizer_name(name)) for name in names}
            except FileNotFoundError:
                continue
            if files and all(checksum(files[n]) == x or not x for n, x in names.items()):
                return files
        raise CacheError(f"{self.stores[0].url}: no source has an intact _meta/tokenizer")

    def config(self) -> bytes | None:
        """Return the stage's configuration, so that `repair` works on the sum too."""
        return next((s.read(_CONFIG) for s in self.stores if s.exists(_CONFIG)), None)


def _unite(
    target: Store, parts: _Parts, *, command: str, on_start: _Progress, on_rows: _Progress
) -> int:
    plan, raw = parts.plan()
    found: dict[tuple[str, int], list[tuple[Store, ShardRecord]]] = {}
    for store, ledger in zip(parts.stores, parts.ledgers, strict=True):
        for record in ledger.records:
            found.setdefault((record.split, record.index), []).append((store, record))
    differ = [
        f"{one[0].full_url(one[1].path)} and {two[0].full_url(two[1].path)}"
        for one, *others in found.values()
        for two in others
        if two[1].xxh3_128 != one[1].xxh3_128
    ]
    if differ:
        raise CacheError(
            "caches of one identity hold different shards:\n  - " + "\n  - ".join(differ) + "\n",
            do="verify each cache; a shard is the same bytes whoever makes it on one kind of "
            "machine",
        )
    claim_folder(target, plan, raw)
    config = parts.config()
    if config is not None:
        target.write(_CONFIG, config)

    def make(place: int) -> tuple[ShardRecord, bytes] | None:
        key = (plan.shards[place].split, plan.shards[place].index)
        for store, listed in found.get(key, []):
            try:
                record = decode_record(store.read(record_name(*key)))
                if record is not None and record.xxh3_128 == listed.xxh3_128:
                    return record, read_shard(store, record)
            except (CacheError, FileNotFoundError):
                continue
        return None

    on_start(sum(item.rows for item in plan.shards))
    records = fill(target, plan.shards, make, on_rows)
    if len(records) < len(plan.shards):
        have = {(record.split, record.index) for record in records}
        keys = [(item.split, item.index) for item in plan.shards]
        names = [f"{split}/{index:05d}" for split, index in keys if (split, index) not in have]
        more = ", ..." if len(names) > 8 else ""
        raise CacheError(
            f"{target.url}: {len(records)} of {len(plan.shards)} shards are there; no source has "
            f"an intact {', '.join(names[:8])}{more}",
            do=f"run cache-teacher with --cache_dir {target.url}, which makes only those, or merge "
            "again with a cache that has them",
        )
    whole = parts.whole.manifest if parts.whole else None
    scheme = plan.identity["scheme"]
    finish(
        target,
        records,
        identity=plan.identity,
        spec=CodecSpec.from_json(whole.codec if whole else plan.identity["codec"]),
        temperatures=whole.temperatures if whole else scheme["temperatures"],
        tokenizer=parts.tokenizer(),
        corpus_counts=whole.corpus_counts if whole else derived_counts(records),
        command=command,
    )
    return sum(record.rows for record in records)


def _open_all(sources: Sequence[Store], ledgers: Sequence[Ledger]) -> list[Cache]:
    """Open whole caches of several identities; say at once all that keeps them apart."""
    mistakes: list[str] = []
    caches: list[Cache] = []
    digests = [ledger.identity_digest for ledger in ledgers]
    for store, ledger in zip(sources, ledgers, strict=True):
        if digests.count(ledger.identity_digest) > 1:
            mistakes.append(f"{store.url}: of the same identity as another; merge these two first")
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
            "the caches do not fit together:\n  - " + "\n  - ".join(mistakes) + "\n",
            expected="whole caches of one tokenizer, codec, scheme and temperature grid",
            do="`slice --top-k` makes the numbers of entries equal",
        )
    return caches


def _common(cache: Cache) -> dict[str, Any]:
    """Return what all sources must have alike: a row could not say it of itself."""
    identity = cache.manifest.identity
    return {
        "tokenizer": identity["tokenizer"],
        "codec": cache.manifest.codec,
        "scheme": identity["scheme"],
        "temperatures": list(cache.manifest.temperatures),
    }


def _append(
    target: Store,
    caches: Sequence[Cache],
    *,
    command: str,
    workers: int,
    on_start: _Progress,
    on_rows: _Progress,
) -> int:
    parts = [
        (cache, record)
        for split in SPLITS
        for cache in caches
        for record in cache.manifest.of_split(split)
    ]
    on_start(sum(record.rows for _, record in parts))
    ids: list[NDArray[np.bytes_]] = []
    names: list[str] = []
    for (_, record), (short, digest) in zip(parts, in_threads(_ids, parts, workers), strict=True):
        ids.append(short)
        names.append(digest)
        on_rows(record.rows)
    repeated = _check_splits(parts, ids)
    identity = _joined_identity(caches, repeated)
    shards: list[PlannedRows] = []
    for (_, record), digest in zip(parts, names, strict=True):
        index = sum(item.split == record.split for item in shards)
        shards.append(PlannedRows(record.split, index, record.rows, record.tokens, digest))
    plan = Plan(identity, tuple(shards))
    tokenizer = caches[0].tokenizer_files()
    claim_folder(target, plan, encode_plan(plan))
    digest = fingerprint(identity)

    def make(place: int) -> tuple[ShardRecord, bytes]:
        cache, record = parts[place]
        item = shards[place]
        table = read_table(cache.store, record, cache.manifest.identity_digest)
        return encode_table(table, split=item.split, index=item.index, identity_digest=digest)

    on_start(sum(item.rows for item in shards))
    records = fill(target, shards, make, on_rows)
    finish(
        target,
        records,
        identity=identity,
        spec=caches[0].spec,
        temperatures=caches[0].manifest.temperatures,
        tokenizer=tokenizer,
        corpus_counts=derived_counts(records),
        command=command,
    )
    return sum(record.rows for record in records)


def _ids(part: tuple[Cache, ShardRecord]) -> tuple[NDArray[np.bytes_], str]:
    cache, record = part
    try:
        table = read_table(cache.store, record, cache.manifest.identity_digest)
    except CacheError as error:
        raise CacheError(
            f"{cache.store.full_url(record.path)}: shard damaged: {error.found}",
            do=f"run python -m pipeline.cache repair {cache.store.url} first",
        ) from None
    names = table.column("sample_id").to_pylist()
    return short_ids(names), fingerprint(names)


def _check_splits(
    parts: Sequence[tuple[Cache, ShardRecord]], ids: Sequence[NDArray[np.bytes_]]
) -> int:
    """Refuse a sample that one source holds out and another trains on; return the repeats."""
    sides = {
        split: np.unique(
            np.concatenate(
                [
                    np.zeros(0, "S16"),
                    *(i for (_, r), i in zip(parts, ids, strict=True) if r.split == split),
                ]
            )
        )
        for split in SPLITS
    }
    both = np.intersect1d(sides["train"], sides["heldout"], assume_unique=True).size
    if both:
        raise CacheError(
            f"{both} samples are held out in one cache and trained on in another",
            expected="samples on the same side everywhere; a student would be measured on what it "
            "was trained on",
            do="make the caches with the same seed and --corpus.heldout_fraction, or leave those "
            "samples out with `slice`",
        )
    return sum(part.size for part in ids) - sum(side.size for side in sides.values())


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
        "teacher": _joined([identity["teacher"] for identity in identities]),
        "corpus": _joined([identity["corpus"] for identity in identities]),
        "shard_tokens": max(int(identity["shard_tokens"]) for identity in identities),
        "derived": derived,
    }


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one object for several: equal members once, numbers by the largest, else all of them.

    Readers ask for a teacher's name and a corpus's longest sample; both stay what they were.
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
