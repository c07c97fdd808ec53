"""A cache made of other caches: its folder claimed, its shards committed one by one, finished last.

The same command again keeps the shards that are there and whole, and makes the others.
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

__all__ = ["check_apart", "claim_folder", "derived_counts", "fill", "finish"]


def check_apart(target: Store, sources: Sequence[Store]) -> None:
    """Refuse a target that is a source, or lies within one, or holds one.

    Raises:
        CacheError: it is so.
    """
    for source in sources:
        one, two = f"{_real_path(target)}/", f"{_real_path(source)}/"
        if target.is_local == source.is_local and (one.startswith(two) or two.startswith(one)):
            raise CacheError(
                f"{target.url}: the source {source.url} would be written to",
                expected="a folder apart from the sources, not one within or around them",
            )


def _real_path(store: Store) -> str:
    """Return a local root without symbolic links, which would hide that it is the source's."""
    return os.path.realpath(store.root) if store.is_local else store.root


def claim_folder(target: Store, plan: Plan, raw: bytes) -> None:
    """Write the plan, or agree with the one that is there.

    Raises:
        CacheError: the folder holds another cache, or the start of one.
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
        expected="an empty folder, or what this very command has begun",
        do="choose another target, or delete that cache",
    )


def fill(
    target: Store,
    shards: Sequence[PlannedRows],
    make: Callable[[int], tuple[ShardRecord, bytes] | None],
    on_rows: Callable[[int], None],
) -> list[ShardRecord]:
    """Commit every shard that is not there yet and return the records, in the plan's order.

    Args:
        target: the new cache's root.
        shards: what is planned.
        make: encodes the shard at this place of the plan; None where it cannot be made.
        on_rows: told of rows as they are done.
    """
    # A finished cache is compared byte by byte; one that goes on trusts sizes, as stage one does.
    finished = target.exists(MANIFEST)
    records: list[ShardRecord] = []
    for place, item in enumerate(shards):
        record = intact_record(target, item.split, item.index, check_bytes=finished)
        if record is None or (record.rows, record.tokens) != (item.rows, item.tokens):
            made = make(place)
            if made is None:
                continue
            if finished:
                # While shards are made anew the cache must not call itself complete.
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
    """Write the tokenizer's files, and all that makes the shards a cache; the manifest last."""
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
    """Return the counts for people that follow from the shards alone."""
    return {
        "samples": sum(record.rows for record in records),
        "train": sum(record.rows for record in records if record.split == "train"),
        "heldout": sum(record.rows for record in records if record.split == "heldout"),
        "tokens": sum(record.tokens for record in records),
        "loss_tokens": sum(record.loss_tokens for record in records),
    }
