"""The work plan of stage one: samples cut into shards of about equal tokens, before any is made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cache.manifest import MANIFEST, PLAN, SPLITS, describe_difference, read_manifest
from pipeline.config import fingerprint
from pipeline.corpus.sample import Sample
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = ["PlannedShard", "WorkPlan", "make_plan", "settle_plan"]


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One shard to be made: which samples, in which order."""

    split: str
    index: int
    samples: tuple[Sample, ...]

    @property
    def name(self) -> str:
        """The shard's name in claims and logs, such as `train-00000`."""
        return f"{self.split}-{self.index:05d}"

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(int(sample.input_ids.size) for sample in self.samples)


@dataclass(frozen=True, slots=True)
class WorkPlan:
    """All shards of a cache; a pure function of the identity's corpus."""

    shards: tuple[PlannedShard, ...]

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
                    "samples_sha256": fingerprint([s.sample_id for s in shard.samples]),
                }
                for shard in self.shards
            ],
        }
        return json.dumps(data, indent=1, ensure_ascii=False).encode()


def make_plan(samples: Sequence[Sample], *, shard_tokens: int) -> WorkPlan:
    """Cut each split into shards of about `shard_tokens`, in the corpus's order.

    The number of shards is rounded to the nearest, and the cut follows the running total, so
    that shards of a split differ by at most one sample from equal size.
    """
    shards: list[PlannedShard] = []
    for split in SPLITS:
        chosen = [sample for sample in samples if sample.split == split]
        total = sum(int(sample.input_ids.size) for sample in chosen)
        count = max(1, round(total / shard_tokens))
        groups: list[list[Sample]] = [[] for _ in range(count)]
        seen = 0
        for sample in chosen:
            middle = seen + sample.input_ids.size / 2
            groups[min(count - 1, int(middle * count / total))].append(sample)
            seen += int(sample.input_ids.size)
        filled = [group for group in groups if group]
        shards += [PlannedShard(split, index, tuple(g)) for index, g in enumerate(filled)]
    return WorkPlan(tuple(shards))


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
        found = _planned_identity(store, present)
    difference = describe_difference(found, identity)
    raise CacheError(
        f"{store.url}: holds a cache of another identity ({difference or 'another cut'})",
        expected="an empty folder, or a cache made with these settings",
        do="choose another --cache_dir, or delete that cache",
    )


def _planned_identity(store: Store, content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
        identity: dict[str, Any] = data["identity"]
        intact = fingerprint(identity) == data["identity_digest"]
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CacheError(
            f"{store.full_url(PLAN)}: damaged", do="delete it; finished shards are kept and checked"
        )
    return identity
