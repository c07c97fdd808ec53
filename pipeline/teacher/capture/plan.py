"""A shard as a piece of work, and whose folder it is: the identity is written before anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipeline.cache.layout.manifest import describe_difference, read_manifest
from pipeline.cache.layout.names import MANIFEST, PLAN, RECORDS, shard_label
from pipeline.cache.layout.recorded import Recorded
from pipeline.config import fingerprint
from pipeline.corpus.sample import Sample
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.teacher.capture.identity import as_begun
from pipeline.teacher.engines.base import CaptureRequest

__all__ = [
    "PlannedShard",
    "ShardSamples",
    "another_identity",
    "begun_identity",
    "capture_requests",
    "complete_plan",
    "folder_identity",
    "identity_difference",
    "plan_identity",
    "settle_plan",
]


class ShardSamples(Protocol):
    """The samples of a shard: what is known of them, and how they are read."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, about."""
        ...

    @property
    def source_xxh3_128(self) -> str:
        """Checksum of what they were read from; empty where there is no such thing."""
        ...

    def samples(self) -> Sequence[Sample]:
        """Read them.

        Raises:
            CorpusError: they cannot be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One shard to be captured: which samples, in which order."""

    split: str
    index: int
    source: ShardSamples

    @property
    def name(self) -> str:
        """The shard's name in leases and logs, such as `train-00000`."""
        return shard_label(self.split, self.index)

    @property
    def key(self) -> tuple[str, int]:
        """Split and index."""
        return self.split, self.index

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, about."""
        return self.source.num_tokens

    @property
    def samples(self) -> Sequence[Sample]:
        """The samples; read at each access, but for the last few groups."""
        return self.source.samples()

    def is_done(self, store: Store) -> bool:
        """Return whether it is recorded, alone or in a segment, by one listing."""
        return self.key in Recorded(store.list(RECORDS))

    def requests(self) -> list[CaptureRequest]:
        """Return what the engine is asked for."""
        return capture_requests(self.samples, split=self.split)


def capture_requests(samples: Sequence[Sample], *, split: str = "train") -> list[CaptureRequest]:
    """Return the rows of samples: a supervised token's target is one row before it."""
    return [
        CaptureRequest(
            sample_id=sample.sample_id,
            input_ids_L=sample.input_ids,
            rows_N=np.flatnonzero(sample.loss_mask).astype(np.int64) - 1,
            requested_NK=None if sample.written is None else sample.written.top_ids_NK,
            split=split,
        )
        for sample in samples
    ]


def settle_plan(store: Store, identity: dict[str, Any]) -> None:
    """Write whose folder it is, or agree with what is there.

    Raises:
        CacheError: the folder holds a cache, or the start of one, of another identity.
    """
    if store.create(PLAN, _plan_bytes(identity)):
        return
    found = plan_identity(store, PLAN, store.read(PLAN), "shards")
    if found != identity:
        raise another_identity(store, identity_difference(found, identity))


def complete_plan(store: Store, identity: dict[str, Any], counts: Mapping[str, int]) -> None:
    """Add the number of shards of each split to the plan, once it is known.

    Every worker writes the same; tools say by it what an unfinished cache lacks.
    """
    content = _plan_bytes(identity, counts)
    try:
        if store.read(PLAN) == content:
            return
    except FileNotFoundError:
        pass
    store.write(PLAN, content)


def _plan_bytes(identity: dict[str, Any], counts: Mapping[str, int] | None = None) -> bytes:
    data: dict[str, Any] = {"identity": identity, "identity_digest": fingerprint(identity)}
    if counts is not None:
        data["shards"] = dict(counts)
    return json.dumps(data, indent=1, ensure_ascii=False).encode()


def identity_difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Name what differs; of a cache of written responses and one of the corpus's own, just that."""
    written = ["generate" in identity.get("corpus", {}) for identity in (found, wanted)]
    if written[0] == written[1]:
        return describe_difference(found, wanted)
    whose = ["the teacher's" if own else "the corpus's" for own in written]
    return f"responses: {whose[0]} there, {whose[1]} asked for"


def another_identity(store: Store, difference: str) -> CacheError:
    """Return the error of a folder that belongs to another cache."""
    return CacheError(
        f"{store.url}: holds a cache of another identity ({difference or 'another cut'})",
        expected="an empty folder, or a cache made with these settings",
        do="choose another --cache_dir, or delete that cache",
    )


def plan_identity(store: Store, name: str, content: bytes, parts: str) -> dict[str, Any]:
    """Return the identity that a plan file holds.

    Raises:
        CacheError: the file is damaged; finished `parts` lose nothing when it is deleted.
    """
    try:
        data = json.loads(content)
        identity: dict[str, Any] = data["identity"]
        intact = fingerprint(identity) == data["identity_digest"]
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CacheError(
            f"{store.full_url(name)}: damaged",
            do=f"delete it; finished {parts} are kept and checked",
        )
    return identity


def begun_identity(store: Store) -> dict[str, Any] | None:
    """Return what is known before the teacher is asked anything, of the cache that is here.

    What is damaged is for others to complain about.
    """
    found = folder_identity(store)
    return None if found is None else as_begun(found)


def folder_identity(store: Store) -> dict[str, Any] | None:
    """Return the identity of the cache that the folder holds or begins, if one can be read."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        return dict(json.loads(store.read(PLAN))["identity"])
    if store.exists(MANIFEST):
        with suppress(CacheError):
            return dict(read_manifest(store).identity)
    return None
