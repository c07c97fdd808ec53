"""The caches of a mixture: opened, compared with each other, and seen as one cache.

Shapes: R rows of a shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.cache.io.reader import Cache, SplitSource, open_cache
from pipeline.cache.io.segments import iter_records
from pipeline.cache.layout.manifest import Manifest, describe_difference
from pipeline.cache.layout.names import SPLITS
from pipeline.cache.layout.records import ShardRecord
from pipeline.cache.tools.checking.sample_ids import SampleIds
from pipeline.cache.tools.merge import joined_members
from pipeline.data.filter import FilterCounts, filter_rows
from pipeline.data.mixture.rows import MixedPart, MixedRows, SharedRows
from pipeline.data.mixture.settings import CacheShare
from pipeline.data.settings import Teachers
from pipeline.data.source import RowSource
from pipeline.errors import CacheError, Mistakes
from pipeline.sampling.inclusion import InclusionRule

__all__ = [
    "MixedCache",
    "caches_of",
    "check_apart",
    "filtered_training_rows",
    "open_caches",
    "tags_of",
]


class MixedCache(Cache):
    """Several caches as one; its manifest names what is common, and joins what is not."""

    def __init__(
        self, shares: Sequence[CacheShare], caches: Sequence[Cache], teachers: Teachers
    ) -> None:
        """Use `open_caches`."""
        self.shares, self.caches, self.teachers = tuple(shares), tuple(caches), teachers
        super().__init__(caches[0].store, _joined_manifest(shares, caches, teachers))

    @property
    def rule(self) -> InclusionRule | None:
        """How entries were sampled, if those of all caches were; the first cache's."""
        rules = [cache.rule for cache in self.caches]
        return None if None in rules else rules[0]

    @property
    def heldout_rule(self) -> InclusionRule | None:
        """The same of the held-out rows."""
        rules = [cache.heldout_rule for cache in self.caches]
        return None if None in rules else rules[0]

    def records(self, split: str | None = None) -> Sequence[ShardRecord]:
        """Return the records of all caches, one cache after the other, paths with the tag."""
        return [
            replace(record, path=f"{share.tag}/{record.path}")
            for share, cache in zip(self.shares, self.caches, strict=True)
            for record in cache.records(split)
        ]

    def full_url(self, path: str) -> str:
        """Return the address of a file that is named with its cache's tag in front."""
        tag, _, inside = path.partition("/")
        for share, cache in zip(self.shares, self.caches, strict=True):
            if share.tag == tag:
                return cache.full_url(inside)
        return super().full_url(path)

    def source(  # type: ignore[override]
        self, split: str, *, top_k: int | None = None, tau_factor: float | None = None
    ) -> RowSource:
        """Return the rows of one split of all caches; see `Cache.source`.

        The training rows are those of one cache after the other, or each row once under `teachers`
        `mean` and `one`; held-out rows are every cache's own.

        Raises:
            CacheError: as in `Cache.source`, of each cache; or the caches hold other rows than the
                first, under `mean` and `one`.
        """
        mistakes = Mistakes()
        sources: list[SplitSource] = []
        for cache in self.caches:
            with mistakes.collected():
                sources.append(cache.source(split, top_k=top_k, tau_factor=tau_factor))
        mistakes.raise_any()
        parts = tuple(
            MixedPart(share.tag, share.weight, source)
            for share, source in zip(self.shares, sources, strict=True)
        )
        if split == "heldout" or self.teachers == "each":
            return MixedRows(parts)
        _check_same_rows(parts, self.teachers)
        return SharedRows(sources[0], parts, self.teachers)


def filtered_training_rows(
    source: RowSource, cache: Cache, text: str
) -> tuple[RowSource, dict[str, FilterCounts]]:
    """Return the training rows that meet a condition, and how many they are by tag.

    Of a mixture each cache's rows are asked for what that cache knows; of caches of the same rows
    (`teachers` `mean` and `one`) the first cache is asked for all.

    Args:
        source: from `cache.source("train")`.
        cache: a cache or a mixture.
        text: the condition; see `pipeline.data.filter`.

    Raises:
        ConfigError: no row of a cache meets it.
        CacheError: a shard is missing or damaged.
    """
    if not isinstance(source, MixedRows):
        first = caches_of(cache)[0]
        rows, counts = filter_rows(source, first, text)
        return rows, {"": counts}
    mistakes = Mistakes()
    parts, found = [], {}
    for part, own in zip(source.parts, caches_of(cache), strict=True):
        with mistakes.collected():
            rows, found[part.tag] = filter_rows(part.source, own, text, name=part.tag)
            parts.append(part._replace(source=rows))
    mistakes.raise_any()
    return MixedRows(tuple(parts)), found


def caches_of(cache: Cache) -> Sequence[Cache]:
    """Return the caches of a mixture, or the one cache."""
    return cache.caches if isinstance(cache, MixedCache) else [cache]


def tags_of(cache: Cache) -> tuple[str, ...]:
    """Return the tags of a mixture's caches, in order; none of a single cache."""
    return tuple(share.tag for share in cache.shares) if isinstance(cache, MixedCache) else ()


def open_caches(cache_dir: str | Sequence[CacheShare], *, teachers: Teachers = "each") -> Cache:
    """Open a cache, or those of a mixture.

    Args:
        cache_dir: an address, or shares.
        teachers: what to make of caches of the same rows; see `data.teachers`.

    Raises:
        CacheError: no complete cache at an address, or the caches do not fit together; everything
            at once.
    """
    if isinstance(cache_dir, str):
        return open_cache(cache_dir)
    mistakes = Mistakes()
    opened: list[tuple[CacheShare, Cache]] = []
    for share in cache_dir:
        with mistakes.collected():
            opened.append((share, open_cache(share.url)))
    for misfit in _misfits(opened):
        with mistakes.collected():
            raise misfit
    mistakes.raise_any()
    shares, caches = zip(*opened, strict=True)
    return MixedCache(shares, caches, teachers)


def check_apart(cache: Cache) -> None:
    """Reject a mixture that trains on samples which another of its caches holds out.

    Reads the identities of all rows: 16 bytes each.

    Raises:
        CacheError: there are such samples, or a segment of records is damaged.
    """
    parts = caches_of(cache)
    if len(parts) == 1:
        return
    ids, shards = SampleIds(), 0
    trained = 0
    for split in SPLITS:
        for part in parts:
            for record in iter_records(part.store, part.manifest, split):
                ids.add(record.row_ids, shards)
                shards += 1
        if split == "train":
            trained = shards
    both = sum(ids.repeats(trained).across.values())
    if both:
        raise CacheError(
            f"cache_dir: {both} samples are held out in one cache and trained on in another",
            expected="samples on the same side everywhere; a student would be measured on what it "
            "was trained on",
            do="build the caches with the same seed and --corpus.heldout_fraction, or leave those "
            "samples out with `slice`",
        )


def _misfits(opened: Sequence[tuple[CacheShare, Cache]]) -> Iterator[CacheError]:
    """Yield what must be equal and is not, one error a cache, and caches that are named twice."""
    for place, (share, cache) in enumerate(opened):
        twin = next((s for s, c in opened[:place] if c.store.place == cache.store.place), None)
        if twin is not None:
            yield CacheError(
                f"cache_dir: {share.tag} and {twin.tag} are the same cache, {share.url}",
                expected="each cache once",
                do="raise its weight, or correct the address",
            )
    for share, cache in opened[1:]:
        first_share, first = opened[0]
        difference = describe_difference(_common(cache), _common(first), limit=99)
        if difference:
            told = difference.replace(" asked for", f" in {first_share.tag}")
            yield _misfit(share, first_share, told.replace(" there", ""))
    # Among sampled caches the step of rounding is part of the estimate.
    sampled = [
        (share, spec.quantisation.sampled_step)
        for share, cache in opened
        for spec in map(cache.spec.of_split, SPLITS)
        if spec.rule is not None
    ]
    different = dict.fromkeys(pair for pair in sampled[1:] if pair[1] != sampled[0][1])
    for share, step in different:
        other, first_step = sampled[0]
        told = f"codec.quantisation.sampled_step: {step:g}, {first_step:g} in {other.tag}"
        yield _misfit(share, other, told)
    if opened:
        common = set.intersection(*({*cache.manifest.temperatures} for _, cache in opened))
        if not common:
            yield CacheError("cache_dir: the caches share no temperature", expected="one at least")


def _misfit(share: CacheShare, other: CacheShare, told: str) -> CacheError:
    return CacheError(
        f"cache_dir: {share.tag} does not fit together with {other.tag}: {told}",
        expected="one tokenizer, one vocabulary and one quantisation in all caches of a mixture",
        do="make them with teachers of one family, or leave it out",
    )


def _common(cache: Cache) -> dict[str, Any]:
    return {
        "tokenizer": cache.manifest.identity["tokenizer"],
        "codec.vocab_size": cache.manifest.codec.get("vocab_size"),
    }


def _check_same_rows(parts: Sequence[MixedPart], teachers: str) -> None:
    """Compare the sizes of all rows; their identities and text are compared as they are read."""
    first = parts[0].source
    rows = list(first.shard_rows())
    for part in parts[1:]:
        same = list(part.source.shard_rows()) == rows and all(
            np.array_equal(part.source.shard_sizes(shard), first.shard_sizes(shard))
            for shard in range(len(rows))
        )
        if not same:
            raise CacheError(
                f"{part.tag}: other training rows than {parts[0].tag}",
                expected=f"the same rows in the same shards under data.teachers {teachers}",
                do="make the caches from one prepared corpus (--corpus.prepared) with equal "
                "--capture.shard_tokens, or train with data.teachers each",
            )


def _joined_codec(caches: Sequence[Cache], *, sampled: bool) -> dict[str, Any]:
    """Return the first cache's codec; without rule of a split that is not sampled in all."""
    codec = caches[0].spec.to_json()
    if not sampled:
        codec["inclusion_rule"] = None
    heldout = caches[0].spec.of_split("heldout").to_json()
    codec.pop("heldout", None)
    if not sampled and all(cache.heldout_rule is not None for cache in caches):
        codec["heldout"] = {name: heldout[name] for name in ("inclusion_rule", "quantisation")}
    return codec


def _joined_manifest(
    shares: Sequence[CacheShare], caches: Sequence[Cache], teachers: Teachers
) -> Manifest:
    """Return a manifest of all, which is never written: what a run and its report read of it."""
    manifests = [cache.manifest for cache in caches]
    first = manifests[0]
    identities = [manifest.identity for manifest in manifests]
    sampled = all(cache.rule is not None for cache in caches)
    schemes = {
        share.tag: identity["scheme"] for share, identity in zip(shares, identities, strict=True)
    }
    scheme = first.identity["scheme"]
    if any(other != scheme for other in schemes.values()):
        scheme = {"name": "mixed" if sampled else "top-k", "parts": schemes}
    identity = {
        **first.identity,
        "teacher": joined_members([identity["teacher"] for identity in identities]),
        "corpus": joined_members([identity["corpus"] for identity in identities]),
        "scheme": scheme,
        "derived": {
            "from": [manifest.identity_digest for manifest in manifests],
            "how": {
                "command": "mixture",
                "tags": [share.tag for share in shares],
                "weights": [share.weight for share in shares],
                "teachers": teachers,
            },
        },
    }
    grids = [set(manifest.temperatures) for manifest in manifests]
    return replace(
        first,
        identity=identity,
        codec=_joined_codec(caches, sampled=sampled),
        temperatures=tuple(t for t in first.temperatures if all(t in grid for grid in grids)),
        segments=tuple(segment for manifest in manifests for segment in manifest.segments),
        corpus_content=" + ".join(manifest.corpus_content for manifest in manifests),
    )
