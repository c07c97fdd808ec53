"""The work plan of stage one: samples cut into shards of about equal tokens, before the capture."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cache.io.writer import read_record
from pipeline.cache.layout.manifest import describe_difference, read_manifest
from pipeline.cache.layout.names import MANIFEST, PLAN, SPLITS, record_name, shard_label
from pipeline.config import fingerprint
from pipeline.corpus.sample import Sample
from pipeline.corpus.table import SampleTable
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.teacher.capture.identity import as_begun
from pipeline.teacher.engines.base import CaptureRequest

__all__ = [
    "PlannedShard",
    "WorkPlan",
    "another_identity",
    "begun_identity",
    "capture_requests",
    "cut_shards",
    "folder_identity",
    "plan_identity",
    "settle_plan",
]


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One shard to be captured: which samples, in which order."""

    split: str
    index: int
    samples: SampleTable
    """A view: reading it reads the samples, holding it costs nothing."""

    @property
    def name(self) -> str:
        """The shard's name in leases and logs, such as `train-00000`."""
        return shard_label(self.split, self.index)

    @property
    def file_name(self) -> str:
        """Its record among the records."""
        return record_name(self.split, self.index).rsplit("/", 1)[-1]

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return self.samples.num_tokens

    def is_done(self, store: Store) -> bool:
        """Return whether there is an intact record, by one request."""
        return read_record(store, self.split, self.index) is not None

    def requests(self) -> list[CaptureRequest]:
        """Return what the engine is asked for."""
        return capture_requests(self.samples)


def capture_requests(samples: Sequence[Sample]) -> list[CaptureRequest]:
    """Return the rows of samples: a supervised token's target is one row before it."""
    return [
        CaptureRequest(
            sample_id=sample.sample_id,
            input_ids_L=sample.input_ids,
            rows_N=np.flatnonzero(sample.loss_mask).astype(np.int64) - 1,
        )
        for sample in samples
    ]


@dataclass(frozen=True, slots=True)
class WorkPlan:
    """All shards of a cache; a pure function of the identity's corpus."""

    shards: tuple[PlannedShard, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Shards by split; a split without any is left out."""
        splits = [shard.split for shard in self.shards]
        return {split: splits.count(split) for split in SPLITS if split in splits}

    @property
    def num_rows(self) -> int:
        """Samples of all shards."""
        return sum(len(shard.samples) for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.num_tokens for shard in self.shards)

    def to_bytes(self, identity: dict[str, Any]) -> bytes:
        """Return the plan file; a later run with another identity is recognised by it."""
        data = {
            "identity": identity,
            "identity_digest": fingerprint(identity),
            "shards": [
                {
                    "split": shard.split,
                    "index": shard.index,
                    "rows": len(shard.samples),
                    "tokens": shard.num_tokens,
                    "samples_sha256": _ids_fingerprint(shard.samples),
                }
                for shard in self.shards
            ],
        }
        return json.dumps(data, indent=1, ensure_ascii=False).encode()


def cut_shards(samples: SampleTable, *, shard_tokens: int) -> WorkPlan:
    """Cut each split into shards of about `shard_tokens`, in the corpus's order.

    The number of shards is rounded to the nearest, and the cut follows the running total, so
    that shards of a split differ by at most one sample from equal size.
    """
    shards: list[PlannedShard] = []
    for split in SPLITS:
        chosen = samples.of_split(split)
        cuts = itertools.pairwise([*_starts(chosen, shard_tokens), len(chosen)])
        shards += [
            PlannedShard(split, index, chosen[start:stop])
            for index, (start, stop) in enumerate(cuts)
        ]
    return WorkPlan(tuple(shards))


def _starts(samples: SampleTable, shard_tokens: int) -> Iterator[int]:
    """Yield where each shard begins: a sample belongs where its middle falls."""
    total = samples.num_tokens
    count = max(1, round(total / shard_tokens))
    place = seen = 0
    last = -1
    for lengths_N in samples.lengths():
        ends_N = seen + np.cumsum(lengths_N)
        middle_N = ends_N - lengths_N / 2
        shard_N = np.minimum(count - 1, (middle_N * count / total).astype(np.int64))
        yield from (place + np.flatnonzero(np.diff(shard_N, prepend=last))).tolist()
        place, seen, last = place + lengths_N.size, int(ends_N[-1]), int(shard_N[-1])


def _ids_fingerprint(samples: SampleTable) -> str:
    """Return `fingerprint` of the list of ids, without the list."""
    digest = hashlib.sha256(b"[")
    for number, sample_id in enumerate(samples.sample_ids()):
        digest.update(f'{"," if number else ""}"{sample_id}"'.encode())
    digest.update(b"]")
    return digest.hexdigest()


def settle_plan(store: Store, plan: WorkPlan, identity: dict[str, Any]) -> None:
    """Write the plan, or agree with the one that is there.

    Raises:
        CacheError: the folder holds a cache, or the start of one, of another identity.
    """
    content = plan.to_bytes(identity)
    if not store.exists(PLAN) and store.exists(MANIFEST):
        found = read_manifest(store).identity  # the plan was deleted; the cache says whose it is
        if fingerprint(found) == fingerprint(identity):
            store.write(PLAN, content)
            return
    elif store.create(PLAN, content):
        return
    else:
        present = store.read(PLAN)
        if present == content:
            return
        found = plan_identity(store, PLAN, present, "shards")
    raise another_identity(store, describe_difference(found, identity))


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
