"""A smaller cache: fewer entries a position, a subset of the samples, one split."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline.cache.codec.subsample import ALL_ENTRIES, EntryLimit, check_limit
from pipeline.cache.io.reader import Cache
from pipeline.cache.io.segments import RecordReader, iter_records
from pipeline.cache.io.tables import encode_table, read_shard, table_from_bytes
from pipeline.cache.layout.inventory import Plan, PlannedRows, encode_plan
from pipeline.cache.layout.names import SPLITS, repair_advice
from pipeline.cache.layout.records import ShardRecord, names_of
from pipeline.cache.tools.checking.sample_ids import SampleIds
from pipeline.cache.tools.derive import check_apart, fill, finish, reserve_folder
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = ["SliceSpec", "slice_cache"]

_HASHES = 1 << 64


@dataclass(frozen=True, slots=True)
class SliceSpec:
    """What to keep; None keeps all. At most one of `samples`, `fraction` and `ids`."""

    top_k: int | None = None
    tau_factor: float | None = None
    """Of a sampled cache: every tau times this factor, without bias."""
    samples: int | None = None
    """This many samples, those of smallest hash: the 100 of a cache are among its 200. A sample
    with rows from several merged caches counts once and keeps all its rows."""
    fraction: float | None = None
    """About this share of the samples, by the same hash."""
    ids: frozenset[str] | None = None
    split: str | None = None

    @property
    def limit(self) -> EntryLimit:
        """Which entries stay."""
        return EntryLimit(self.top_k, self.tau_factor)

    def to_json(self) -> dict[str, Any]:
        """Return what becomes part of the identity; for ids their digest."""
        named = {
            "command": "slice",
            "top_k": self.top_k,
            "tau_factor": self.tau_factor,
            "samples": self.samples,
            "fraction": self.fraction,
            "ids_sha256": None if self.ids is None else fingerprint(sorted(self.ids)),
            "split": self.split,
        }
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, slots=True)
class _Rows:
    """Chosen rows of one shard of the source, in order."""

    split: str
    index: int
    rows: NDArray[np.int64]
    tokens: NDArray[np.int64]
    """Of each of the rows."""
    row_ids: bytes

    def cut(self, start: int, stop: int) -> _Rows:
        """Return some of them."""
        ids = self.row_ids[16 * start : 16 * stop]
        return _Rows(self.split, self.index, self.rows[start:stop], self.tokens[start:stop], ids)


def slice_cache(
    cache: Cache,
    target: Store,
    spec: SliceSpec,
    *,
    command: str,
    workers: int = 1,
    on_start: Callable[[int], None] = lambda rows: None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> int:
    """Write the chosen part of a cache as a new cache; return its rows.

    Which rows are chosen, the records tell: only shards with chosen rows are read. Rows keep their
    order. Where rows are left out, the others are divided into shards of about the source's
    `shard_tokens`; else every shard keeps its rows, and its bytes unless entries are left out.
    Without `top_k` and `tau_factor` the targets are unchanged. A slice of the held-out split
    becomes the training split of the new cache, which must have one. One shard of the source and
    one of the target are in memory, and 36 bytes for each chosen row if some are left out.

    Raises:
        CacheError: nothing is left, an id is unknown, `top_k` or `tau_factor` do not fit, the
            source is damaged, or the target cannot be used.
    """
    check_apart(target, [cache.store])
    _check_limit(cache, spec)
    groups, repeated = _groups(cache, spec)
    source = cache.manifest
    derived: dict[str, Any] = {"from": source.identity_digest, "how": spec.to_json()}
    if repeated:  # of a merged cache; `verify` accepts no other repeats
        derived["repeated_samples"] = repeated
    identity = {**source.identity, "derived": derived}
    if spec.top_k is not None:
        identity["scheme"] = {**source.identity["scheme"], "top_k": spec.top_k}
    codec = cache.spec
    if spec.split == "heldout" and codec.heldout is not None:
        codec = codec.heldout
        scheme = dict(identity["scheme"])
        own = scheme.pop("heldout", {})
        identity["scheme"] = {**scheme, **own}
        identity["codec"] = codec.to_json()
    if codec.rule is not None:
        codec = spec.limit.of_spec(codec)
        assert codec.rule is not None
        identity["scheme"] = {**identity["scheme"], "taus": list(codec.rule.taus)}
        identity["codec"] = codec.to_json()
    shards = [planned for planned, _ in groups]
    plan = Plan(identity, tuple(shards))
    digest = fingerprint(identity)
    records = RecordReader(cache.store, source)

    def make(place: int) -> tuple[ShardRecord, bytes]:
        item, rows = groups[place]
        # Rows that are held out to measure by stay whole, however few entries students see.
        measured = item.split == "heldout" and cache.spec.heldout is not None
        limit = ALL_ENTRIES if measured else spec.limit
        if isinstance(rows, _Whole) and limit == ALL_ENTRIES:
            record = records.read(rows.split, rows.index)
            return record.moved(item.split, item.index), _bytes(cache, record)
        tables = (
            [_table(cache, records.read(rows.split, rows.index))]
            if isinstance(rows, _Whole)
            else _gather(cache, records, rows)
        )
        return encode_table(
            tables,
            split=item.split,
            index=item.index,
            identity_digest=digest,
            limit=limit,
        )

    tokenizer = cache.tokenizer_files()
    reserve_folder(target, plan, encode_plan(plan))
    on_start(sum(item.rows for item in shards))
    fill(target, shards, make, on_rows, workers=workers)
    finish(
        target,
        shards,
        identity=identity,
        spec=codec,
        temperatures=source.temperatures,
        tokenizer=tokenizer,
        corpus_counts=None,
        corpus_content=source.corpus_content,
        command=command,
    )
    return sum(item.rows for item in shards)


def _check_limit(cache: Cache, spec: SliceSpec) -> None:
    """Reject too many entries, or entries of the other kind, before anything is read."""
    held = cache.manifest.identity["scheme"].get("top_k")
    rule = cache.spec.of_split(spec.split or "train").rule
    check_limit(spec.limit, rule=rule, held=held, url=cache.store.url)


@dataclass(frozen=True, slots=True)
class _Whole:
    """All rows of one shard of the source."""

    split: str
    index: int


_Group = tuple[PlannedRows, "_Whole | list[_Rows]"]


def _groups(cache: Cache, spec: SliceSpec) -> tuple[list[_Group], int]:
    """Return the shards of the new cache, and how many of their rows repeat a sample.

    Raises:
        CacheError: nothing is left, or an id is unknown.
    """
    origins = {"train": spec.split} if spec.split else {split: split for split in SPLITS}
    by_row = spec.samples is not None or spec.fraction is not None or spec.ids is not None
    is_in = _chooser(cache, spec, list(origins.values())) if by_row else None
    shard_tokens = int(cache.manifest.identity["shard_tokens"])
    groups: list[_Group] = []
    ids = SampleIds()
    trained = 0
    for split, origin in origins.items():
        if is_in is None:
            for record in iter_records(cache.store, cache.manifest, origin):
                planned = _planned(split, record.index, record.rows, record.tokens, record.row_ids)
                ids.add(record.row_ids, len(groups))
                groups.append((planned, _Whole(origin, record.index)))
        else:
            for index, cut in enumerate(_cut(_chosen(cache, origin, is_in), shard_tokens)):
                row_ids = b"".join(rows.row_ids for rows in cut)
                number, tokens = (sum(int(n) for n in part) for part in (
                    (rows.rows.size for rows in cut), (rows.tokens.sum() for rows in cut)
                ))  # fmt: skip
                ids.add(row_ids, len(groups))
                groups.append((_planned(split, index, number, tokens, row_ids), cut))
        trained = len(groups) if split == "train" else trained
    if not sum(planned.rows for planned, _ in groups[:trained]):
        raise CacheError(
            f"{cache.store.url}: no training sample is left",
            expected="at least one",
            do="take more",
        )
    return groups, ids.repeats(trained).rows


def _planned(split: str, index: int, rows: int, tokens: int, row_ids: bytes) -> PlannedRows:
    return PlannedRows(split, index, rows, tokens, fingerprint(names_of(row_ids)))


def _chooser(cache: Cache, spec: SliceSpec, origins: Sequence[str]) -> Callable[[str], bool]:
    """Return whether a sample is chosen, by its id."""
    url = cache.store.url
    if spec.fraction is not None:
        limit = spec.fraction * _HASHES
        return lambda name: _hash(name) < limit
    if spec.ids is not None:
        wanted = set(spec.ids)
        for origin in origins:
            for record in iter_records(cache.store, cache.manifest, origin):
                wanted.difference_update(record.sample_ids())
        if wanted:
            where = f"the {spec.split} split of " if spec.split else ""
            raise CacheError(
                f"{len(wanted)} of {len(spec.ids)} sample ids are not in {where}"
                f"{url}: {', '.join(sorted(wanted)[:4])}",
                expected="ids of its column sample_id, one per line",
            )
        return spec.ids.__contains__
    assert spec.samples is not None
    # The smallest hashes so far: as many as are wanted, whatever the cache holds.
    smallest = np.zeros(0, np.uint64)
    for origin in origins:
        for record in iter_records(cache.store, cache.manifest, origin):
            hashes = np.array([_hash(name) for name in record.sample_ids()], np.uint64)
            smallest = np.unique(np.concatenate([smallest, hashes]))[: spec.samples]
    if smallest.size < spec.samples:
        raise CacheError(
            f"{url}: holds {smallest.size} samples", expected=f"--samples up to {smallest.size}"
        )
    last = int(smallest[-1])
    return lambda name: _hash(name) <= last


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(b"slice:" + name.encode())


def _chosen(cache: Cache, origin: str, is_in: Callable[[str], bool]) -> list[_Rows]:
    """Return the chosen rows of a split of the source, shard after shard."""
    found: list[_Rows] = []
    for record in iter_records(cache.store, cache.manifest, origin):
        names = record.sample_ids()
        rows = np.array([row for row, name in enumerate(names) if is_in(name)], np.int64)
        if rows.size:
            tokens = np.array(record.row_tokens, np.int64)[rows]
            row_ids = bytes.fromhex("".join(names[row] for row in rows.tolist()))
            found.append(_Rows(origin, record.index, rows, tokens, row_ids))
    return found


def _cut(chosen: Sequence[_Rows], shard_tokens: int) -> list[list[_Rows]]:
    """Divide rows into shards by their cumulative tokens, as stage one's plan does."""
    total = sum(int(rows.tokens.sum()) for rows in chosen)
    count = max(1, round(total / shard_tokens))
    groups: dict[int, list[_Rows]] = {}
    seen = 0
    for rows in chosen:
        ends = seen + np.cumsum(rows.tokens)
        middles = ends - rows.tokens / 2
        group = np.minimum(count - 1, (middles * count / max(total, 1)).astype(np.int64))
        borders = np.flatnonzero(np.diff(group)) + 1
        for start, stop in itertools.pairwise([0, *borders.tolist(), group.size]):
            groups.setdefault(int(group[start]), []).append(rows.cut(start, stop))
        seen = int(ends[-1])
    return [groups[number] for number in sorted(groups)]


def _gather(cache: Cache, records: RecordReader, parts: Sequence[_Rows]) -> list[pa.Table]:
    """Return the rows as one table for each shard of the source, read in order."""
    return [
        _table(cache, records.read(part.split, part.index)).take(pa.array(part.rows))
        for part in parts
    ]


def _table(cache: Cache, record: ShardRecord) -> pa.Table:
    return table_from_bytes(_bytes(cache, record), cache.manifest.shard_identity)


def _bytes(cache: Cache, record: ShardRecord) -> bytes:
    try:
        return read_shard(cache.store, record)
    except CacheError as error:
        raise CacheError(
            f"{cache.store.full_url(record.path)}: shard damaged: {error.found}",
            do=repair_advice(cache.store.url),
        ) from None
