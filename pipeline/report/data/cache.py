"""Records of the cache that the runs learned from."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.report.data.fields import STRICT, Count, Number

__all__ = ["CacheFacts", "ShardFacts"]


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """One shard of the cache."""

    __pydantic_config__ = STRICT

    name: str
    split: str
    samples: Count
    loss_tokens: Count
    size_bytes: Count
    kept_mass_mean: Number | None = None
    entropy_mean: Number | None = None


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What the cache says about itself."""

    __pydantic_config__ = STRICT

    teacher: str
    teacher_revision: str
    corpus: str
    samples: Count
    tokens: Count
    loss_tokens: Count
    size_bytes: Count
    scheme: str
    """The capture scheme in words, as in "top-64 with the mass of the rest"."""
    identity: str
    """The digest of the manifest's identity."""
    temperatures: tuple[Number, ...] = (1.0,)
    kept_mass_mean: Number | None = None
    entropy_mean: Number | None = None
    shards: tuple[ShardFacts, ...] = ()
