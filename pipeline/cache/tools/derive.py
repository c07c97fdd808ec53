"""Write a cache derived from others: reserve its folder, commit its shards, finish it.

The same command again keeps the shards that are there and intact, and writes the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.io.writer import commit_shard, finalize, intact_record
from pipeline.cache.layout.inventory import Plan, PlannedRows
from pipeline.cache.layout.manifest import (
    MANIFEST,
    PLAN,
    ShardRecord,
    describe_difference,
    read_manifest,
    tokenizer_name,
)
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = ["check_apart", "derived_counts", "fill", "finish", "reserve_folder"]


def check_apart(target: Store, sources: Sequence[Store]) -> None:
    """Reject a target that is a source, is within one, or contains one.

    Raises:
        CacheError: the target is one of these.
    """
    for source in sources:
        one, two = f"{_real_path(target)}/", f"{_real_path(source)}/"
        if target.is_local == source.is_local and (one.startswith(two) or two.startswith(one)):
            raise CacheError(
                f"{target.url}: the source {source.url} would be written to",
                expected="a folder apart from the sources, not one within or around them",
            )


def _real_path(store: Store) -> str:
    """Resolve symbolic links in a local root, so that the same folder is recognised."""
    return os.path.realpath(store.root) if store.is_local else store.root


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
) -> list[ShardRecord]:
    """Commit every shard that is missing and return all records, in the plan's order.

    Args:
        target: the new cache's root.
        shards: the planned shards.
        make: encodes the shard at this place of the plan; None where that is impossible.
        on_rows: called with the number of rows written.
    """
    # The shards of a finished cache are compared by checksum; those of one under way by size, as in
    # stage one.
    finished = target.exists(MANIFEST)
    records: list[ShardRecord] = []
    for place, item in enumerate(shards):
        record = intact_record(target, item.split, item.index, check_bytes=finished)
        if record is None or (record.rows, record.tokens) != (item.rows, item.tokens):
            made = make(place)
            if made is None:
                continue
            if finished:
                # While shards are written again the cache must not appear complete.
                target.delete(MANIFEST)
            record = made[0]
            commit_shard(target, *made)
        records.append(record)
        on_rows(item.rows)
    return records


def finish(
    target: Store,
    records: Sequence[ShardRecord],
    *,
    identity: Mapping[str, Any],
    spec: CodecSpec,
    temperatures: Sequence[float],
    tokenizer: Mapping[str, bytes],
    corpus_counts: Mapping[str, int],
    command: str,
) -> None:
    """Write the tokenizer's files, the row index, the card and, last, the manifest."""
    for name, data in tokenizer.items():
        target.write(tokenizer_name(name), data)
    finalize(
        target,
        records,
        identity=identity,
        spec=spec,
        temperatures=temperatures,
        corpus_counts=corpus_counts,
        tokenizer_files=sorted(tokenizer),
        command=command,
    )


def derived_counts(records: Sequence[ShardRecord]) -> dict[str, int]:
    """Return the informative counts that follow from the shards alone."""
    return {
        "samples": sum(record.rows for record in records),
        "train": sum(record.rows for record in records if record.split == "train"),
        "heldout": sum(record.rows for record in records if record.split == "heldout"),
        "tokens": sum(record.tokens for record in records),
        "loss_tokens": sum(record.loss_tokens for record in records),
    }
