"""A smaller cache: fewer entries a position, a subset of the samples, one split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import xxhash

from pipeline.cache.codec.subsample import EntryLimit, check_limit
from pipeline.cache.io.reader import Cache
from pipeline.cache.io.tables import encode_table, read_table
from pipeline.cache.layout.inventory import Plan, PlannedRows, encode_plan
from pipeline.cache.layout.manifest import SPLITS, ShardRecord
from pipeline.cache.tools.derive import check_apart, derived_counts, fill, finish, reserve_folder
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.storage.parallel import in_threads

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
class _Row:
    """A chosen row and its place in the source."""

    shard: int
    row: int
    sample_id: str
    tokens: int


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

    Rows keep their order and are divided into shards of about the source's `shard_tokens`. Without
    `top_k` and `tau_factor` the targets are unchanged. A slice of the held-out split becomes the
    training split of the new cache, which must have one. One shard of the source and one of the
    target are in memory.

    Raises:
        CacheError: nothing is left, an id is unknown, `top_k` or `tau_factor` do not fit, the
            source is damaged, or the target cannot be used.
    """
    check_apart(target, [cache.store])
    _check_limit(cache, spec.limit)
    on_start(sum(record.rows for record in cache.manifest.shards))
    chosen = _choose(cache, spec, workers, on_rows)
    source = cache.manifest
    derived: dict[str, Any] = {"from": source.identity_digest, "how": spec.to_json()}
    names = [row.sample_id for split in SPLITS for row in chosen[split]]
    repeated = len(names) - len(set(names))
    if repeated:  # of a merged cache; `verify` accepts no other repeats
        derived["repeated_samples"] = repeated
    identity = {**source.identity, "derived": derived}
    if spec.top_k is not None:
        identity["scheme"] = {**source.identity["scheme"], "top_k": spec.top_k}
    codec = cache.spec
    if codec.rule is not None:
        codec = spec.limit.of_spec(codec)
        assert codec.rule is not None
        identity["scheme"] = {**source.identity["scheme"], "taus": list(codec.rule.taus)}
        identity["codec"] = codec.to_json()
    groups: list[list[_Row]] = []
    shards: list[PlannedRows] = []
    for split in SPLITS:
        for index, group in enumerate(_cut(chosen[split], int(identity["shard_tokens"]))):
            named = fingerprint([row.sample_id for row in group])
            tokens = sum(row.tokens for row in group)
            shards.append(PlannedRows(split, index, len(group), tokens, named))
            groups.append(group)
    plan = Plan(identity, tuple(shards))
    digest = fingerprint(identity)

    def make(place: int) -> tuple[ShardRecord, bytes]:
        item = shards[place]
        return encode_table(
            _gather(cache, groups[place]),
            split=item.split,
            index=item.index,
            identity_digest=digest,
            limit=spec.limit,
        )

    tokenizer = cache.tokenizer_files()
    reserve_folder(target, plan, encode_plan(plan))
    on_start(sum(item.rows for item in shards))
    records = fill(target, shards, make, on_rows)
    finish(
        target,
        records,
        identity=identity,
        spec=codec,
        temperatures=source.temperatures,
        tokenizer=tokenizer,
        corpus_counts=derived_counts(records),
        command=command,
    )
    return sum(record.rows for record in records)


def _check_limit(cache: Cache, limit: EntryLimit) -> None:
    """Reject too many entries, or entries of the other kind, before anything is read."""
    held = cache.manifest.identity["scheme"].get("top_k")
    check_limit(limit, rule=cache.rule, held=held, url=cache.store.url)


def _choose(
    cache: Cache, spec: SliceSpec, workers: int, on_rows: Callable[[int], None]
) -> dict[str, list[_Row]]:
    """Return the chosen rows of each split of the new cache, in the source's order."""
    records = cache.manifest.shards
    rows: dict[str, list[_Row]] = {split: [] for split in SPLITS}
    for shard, (names, tokens) in enumerate(
        in_threads(lambda record: _names(cache, record), records, workers)
    ):
        split = records[shard].split
        if spec.split in (None, split):
            target = split if spec.split is None else "train"
            rows[target] += [
                _Row(shard, row, name, count)
                for row, (name, count) in enumerate(zip(names, tokens, strict=True))
                if _is_in(name, spec)
            ]
        on_rows(records[shard].rows)
    if spec.ids is not None:
        unknown = spec.ids - {row.sample_id for split in SPLITS for row in rows[split]}
        if unknown:
            where = f"the {spec.split} split of " if spec.split else ""
            raise CacheError(
                f"{len(unknown)} of {len(spec.ids)} sample ids are not in {where}"
                f"{cache.store.url}: {', '.join(sorted(unknown)[:4])}",
                expected="ids of its column sample_id, one per line",
            )
    if spec.samples is not None:
        every = sorted({_hash(row.sample_id) for split in SPLITS for row in rows[split]})
        if len(every) < spec.samples:
            raise CacheError(
                f"{cache.store.url}: holds {len(every)} samples",
                expected=f"--samples up to {len(every)}",
            )
        last = every[spec.samples - 1]
        rows = {s: [row for row in rows[s] if _hash(row.sample_id) <= last] for s in SPLITS}
    if not rows["train"]:
        raise CacheError(
            f"{cache.store.url}: no training sample is left",
            expected="at least one",
            do="take more",
        )
    return rows


def _is_in(name: str, spec: SliceSpec) -> bool:
    if spec.fraction is not None:
        return _hash(name) < spec.fraction * _HASHES
    return spec.ids is None or name in spec.ids


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(b"slice:" + name.encode())


def _names(cache: Cache, record: ShardRecord) -> tuple[list[str], list[int]]:
    table = _table(cache, record)
    return table.column("sample_id").to_pylist(), table.column("num_tokens").to_pylist()


def _table(cache: Cache, record: ShardRecord) -> pa.Table:
    try:
        return read_table(cache.store, record, cache.manifest.identity_digest)
    except CacheError as error:
        raise CacheError(
            f"{cache.store.full_url(record.path)}: shard damaged: {error.found}",
            do=f"run python -m pipeline.cache repair {cache.store.url} first",
        ) from None


def _cut(rows: Sequence[_Row], shard_tokens: int) -> list[list[_Row]]:
    """Divide rows into shards by their cumulative tokens, as stage one's plan does."""
    total = sum(row.tokens for row in rows)
    count = max(1, round(total / shard_tokens))
    groups: list[list[_Row]] = [[] for _ in range(count)]
    seen = 0
    for row in rows:
        groups[min(count - 1, int((seen + row.tokens / 2) * count / total))].append(row)
        seen += row.tokens
    return [group for group in groups if group]


def _gather(cache: Cache, rows: Sequence[_Row]) -> list[pa.Table]:
    """Return the rows as one table for each shard of the source, read in order."""
    parts: list[pa.Table] = []
    for shard in sorted({row.shard for row in rows}):
        wanted = [row.row for row in rows if row.shard == shard]
        table = _table(cache, cache.manifest.shards[shard])
        parts.append(table.take(pa.array(wanted, pa.int64())))
    return parts
