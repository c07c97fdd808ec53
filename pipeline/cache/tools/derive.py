"""Write a cache derived from others: reserve its folder, commit its shards, finish it.

The same command again keeps the shards that are there, and writes the others.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.io.finalize import finalize
from pipeline.cache.io.writer import commit_shard
from pipeline.cache.layout.fold import reopen
from pipeline.cache.layout.inventory import Plan, PlannedRows
from pipeline.cache.layout.manifest import Manifest, describe_difference, read_manifest
from pipeline.cache.layout.names import MANIFEST, PLAN, RECORDS, SPLITS, shard_name, tokenizer_name
from pipeline.cache.layout.recorded import Recorded
from pipeline.cache.layout.records import ShardRecord
from pipeline.errors import CacheError, ConfigError
from pipeline.program import command_name
from pipeline.storage import Store
from pipeline.storage.parallel import in_threads

__all__ = [
    "check_apart",
    "check_order",
    "fill",
    "finish",
    "recorded_shards",
    "reserve_folder",
    "split_counts",
]


def check_order(sources: Sequence[str], target: str, command: str) -> None:
    """Reject addresses in the wrong order: the sources come first, the target last.

    Raises:
        ConfigError: the target holds a cache and a source holds none.
    """
    empty = [url for url in sources if not _holds_cache(Store(url))]
    if not empty or not _holds_cache(Store(target)):
        return
    kept = [url for url in sources if url not in empty]
    swapped = shlex.join(
        [*command_name("pipeline.cache").split(), command, *kept, target, empty[0]]
    )
    raise ConfigError(
        f"{command}: {empty[0]} holds no cache, and {target}, which stands last, holds one",
        expected="the sources first, and the target, a new folder, last",
        do=f"did you mean {swapped}?",
    )


def _holds_cache(store: Store) -> bool:
    return store.exists(MANIFEST) or store.exists(PLAN)


def check_apart(target: Store, sources: Sequence[Store]) -> None:
    """Reject a target that is a source, is within one, or contains one.

    Raises:
        CacheError: the target is one of these.
    """
    for source in sources:
        (system, one), (other, two) = target.place, source.place
        if system == other and (one.startswith(two) or two.startswith(one)):
            raise CacheError(
                f"{target.url}: the source {source.url} would be written to",
                expected="a folder apart from the sources, not one within or around them",
            )


def reserve_folder(target: Store, plan: Plan, raw: bytes) -> None:
    """Write the plan, or check that the one in the folder is the same.

    Raises:
        CacheError: the folder holds another cache, complete or not.
    """
    found: Mapping[str, Any] | None = None
    if not target.exists(PLAN) and target.exists(MANIFEST):
        found = read_manifest(target).identity
        if found == plan.identity:
            target.write(PLAN, raw)
            return
    elif target.create(PLAN, raw) or target.read(PLAN) == raw:
        return
    difference = describe_difference(dict(found), plan.identity) if found else "another plan"
    raise CacheError(
        f"{target.url}: holds another cache ({difference})",
        expected="an empty folder, or one that the same command has begun",
        do="choose another target, or delete that cache",
    )


def fill(
    target: Store,
    shards: Sequence[PlannedRows],
    make: Callable[[int], tuple[ShardRecord, bytes] | None],
    on_rows: Callable[[int], None],
    *,
    workers: int = 1,
) -> list[PlannedRows]:
    """Commit every shard that is missing; return those that could not be made.

    Args:
        target: the new cache's root.
        shards: the planned shards.
        make: returns the shard at this place of the plan; None where that is impossible. Called
            from several threads.
        on_rows: called with the number of rows written.
        workers: shards made at one time.
    """
    present = recorded_shards(target, split_counts(shards))
    missing = [n for n, item in enumerate(shards) if (item.split, item.index) not in present]
    if missing and target.exists(MANIFEST):
        # While shards are written again the cache must not appear complete.
        target.delete(MANIFEST)
    on_rows(sum(item.rows for item in shards) - sum(shards[place].rows for place in missing))

    def commit(place: int) -> bool:
        made = make(place)
        if made is not None:
            commit_shard(target, *made)
        return made is not None

    impossible: list[PlannedRows] = []
    for place, done in zip(missing, in_threads(commit, missing, workers), strict=True):
        if not done:
            impossible.append(shards[place])
            continue
        on_rows(shards[place].rows)
    return impossible


def recorded_shards(store: Store, shards: Mapping[str, int]) -> dict[tuple[str, int], int]:
    """Return the planned shards that are recorded, by split and index, with their files' sizes.

    Three listings tell it; no record is read. A shard with a record and no file is unrecorded from
    here on. Whether a size is the recorded one, `finalize` compares.
    """
    recorded = Recorded(store.list(RECORDS))
    found: dict[tuple[str, int], int] = {}
    lost: list[tuple[str, int]] = []
    for split, count in shards.items():
        if not recorded.count(split, count):
            continue
        sizes = store.sizes(f"data/{split}")
        for index in recorded.shards(split):
            size = sizes.get(shard_name(split, index).rsplit("/", 1)[-1])
            if index < count and size is not None:
                found[split, index] = size
            elif index < count:
                lost.append((split, index))
    for key in reopen(store, lost, recorded=recorded):
        found.pop(key, None)
    return found


def finish(
    target: Store,
    shards: Sequence[PlannedRows],
    *,
    identity: Mapping[str, Any],
    spec: CodecSpec,
    temperatures: Sequence[float],
    tokenizer: Mapping[str, bytes],
    corpus_counts: Mapping[str, int] | None,
    command: str,
    more_counts: Mapping[str, int] | None = None,
    corpus_content: str = "",
    quarantined: Mapping[str, int] | None = None,
) -> Manifest:
    """Write the tokenizer's files, fold the records, write the card and, last, the manifest.

    `corpus_counts` None: those that follow from the shards alone, and `more_counts`. `quarantined`
    rows are planned and not in the shards of these names.

    Raises:
        ShardsMissing: shards are missing, or are not those that `shards` plans.
    """
    for name, data in tokenizer.items():
        target.write(tokenizer_name(name), data)
    planned = {(item.split, item.index): item for item in shards}

    def is_planned(record: ShardRecord) -> bool:
        item = planned.get(record.key)
        if item is None:
            return False
        lacking = (quarantined or {}).get(item.name, 0)
        return record.rows + lacking == item.rows and bool(lacking or record.tokens == item.tokens)

    return finalize(
        target,
        split_counts(shards),
        identity=identity,
        spec=spec,
        temperatures=temperatures,
        corpus_counts=corpus_counts,
        more_counts=more_counts,
        corpus_content=corpus_content,
        tokenizer_files=sorted(tokenizer),
        command=command,
        rows_quarantined=sum((quarantined or {}).values()),
        accept=is_planned,
    )


def split_counts(shards: Sequence[PlannedRows]) -> dict[str, int]:
    """Return the shards of each split; a split without any is left out."""
    counts = Counter(item.split for item in shards)
    return {split: counts[split] for split in SPLITS if counts[split]}
