"""Committed shards to a complete cache: segments of records, the card and, last, the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.layout.card import card_text
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.fold import blocks, fold
from pipeline.cache.layout.manifest import Manifest, Segment, total_of
from pipeline.cache.layout.names import (
    MANIFEST,
    RECORDS,
    SPLITS,
    shard_label,
    tokenizer_name,
)
from pipeline.cache.layout.recorded import Recorded
from pipeline.cache.layout.records import ShardRecord
from pipeline.cache.layout.schema import FORMAT_VERSION
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = ["ShardsMissing", "finalize"]

_SHOWN = 8


class ShardsMissing(CacheError):
    """Planned shards that are not there, or not as they were recorded."""

    def __init__(self, url: str, missing: Sequence[tuple[str, int]], planned: int) -> None:
        """Keep the shards by split and index; none of them is recorded any more."""
        self.missing = tuple(missing)
        names = ", ".join(shard_label(*key) for key in missing[:_SHOWN])
        more = ", ..." if len(missing) > _SHOWN else ""
        super().__init__(
            f"{url}: {len(missing)} of {planned} shards are missing or not as recorded: "
            f"{names}{more}",
            do="run the same command again; it computes only what is missing",
        )


def finalize(
    store: Store,
    shards: Mapping[str, int],
    *,
    identity: Mapping[str, Any],
    spec: CodecSpec,
    temperatures: Sequence[float],
    corpus_counts: Mapping[str, int] | None,
    more_counts: Mapping[str, int] | None = None,
    corpus_content: str = "",
    tokenizer_files: Sequence[str],
    command: str,
    rows_quarantined: int = 0,
    accept: Callable[[ShardRecord], bool] = lambda record: True,
) -> Manifest:
    """Fold all records, write the card and, last, the manifest; return it.

    No shard is read: sizes are compared, from one listing of each split. Killed anywhere and called
    again it writes the same bytes. The requests are those of the files of records and a few more.

    Args:
        store: the cache's root.
        shards: planned, by split.
        identity: of the cache.
        spec: its codec.
        temperatures: its grid.
        corpus_counts: for people; None for those that follow from the records.
        more_counts: what else is known where these follow from the records.
        corpus_content: digest of the text, where it is known.
        tokenizer_files: names below `_meta/tokenizer`.
        command: for the card.
        rows_quarantined: planned rows that the cache goes without; told where there are any.
        accept: whether a record is of the shard that was planned.

    Raises:
        ShardsMissing: shards lack a record or a file of the recorded size; they are unrecorded now.
        CacheError: the cache would hold no training row (no held-out row, where it is made to score
            students on), or lacks a tokenizer file.
    """
    ordered = {split: shards[split] for split in SPLITS if shards.get(split)}
    try:
        tokenizer = {name: checksum(store.read(tokenizer_name(name))) for name in tokenizer_files}
    except FileNotFoundError as error:
        raise CacheError(f"{store.url}: a tokenizer file is missing ({error})") from None
    recorded = Recorded(store.list(RECORDS))
    sizes = {split: store.sizes(f"data/{split}") for split in ordered}
    segments: list[Segment] = []
    missing: list[tuple[str, int]] = []
    for block in blocks(ordered):
        folded = fold(store, block, recorded=recorded, sizes=sizes[block.split], accept=accept)
        missing += folded.missing
        if folded.segment is not None:
            segments.append(folded.segment)
    if missing:
        raise ShardsMissing(store.url, missing, sum(ordered.values()))
    if corpus_counts is None:
        corpus_counts = {**(more_counts or {}), **_counts(segments)}
    counts = dict(corpus_counts)
    if rows_quarantined:  # no member where there is none: a retry that succeeds leaves no trace
        counts["rows_quarantined"] = rows_quarantined
    manifest = Manifest(
        identity=dict(identity),
        codec=spec.to_json(),
        temperatures=tuple(temperatures),
        segments=tuple(segments),
        corpus_counts=counts,
        corpus_content=corpus_content,
        tokenizer_xxh3_128=tokenizer,
        format_version=FORMAT_VERSION,
    )
    split = "heldout" if _is_for_scoring(identity) else "train"
    if not total_of(manifest.of_split(split)).rows:
        kind = "training" if split == "train" else "held-out"
        raise CacheError(f"the cache would hold no {kind} rows", expected="at least one")
    store.write("README.md", card_text(manifest, command).encode())
    store.write(MANIFEST, manifest.to_bytes())
    return manifest


def _is_for_scoring(identity: Mapping[str, Any]) -> bool:
    """Whether the held-out prompts alone were answered, to score students on."""
    generate = identity.get("corpus", {}).get("generate", {})
    return isinstance(generate, Mapping) and generate.get("prompts") == "heldout"


def _counts(segments: Sequence[Segment]) -> dict[str, int]:
    total = total_of(segments)
    by_split = {split: total_of(s for s in segments if s.split == split) for split in SPLITS}
    return {
        "samples": total.rows,
        **{split: by_split[split].rows for split in SPLITS},
        "tokens": total.tokens,
        "loss_tokens": total.loss_tokens,
    }
