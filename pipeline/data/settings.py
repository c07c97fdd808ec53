"""The settings of the data stream; imports no torch, so `--help` stays quick."""

from __future__ import annotations

from pipeline.config import Settings, option

__all__ = ["DataSettings"]


class DataSettings(Settings):
    """How rows of the cache become batches. The seed is the run's, not repeated here."""

    pack_length: int | None = option(
        None, "tokens of one pack; none takes the cache's longest allowed sequence", ge=2
    )
    packing: bool = option(
        True, "put several sequences into one pack; attention does not cross between them"
    )
    shuffle_shards: int = option(
        8, "packs are shuffled within groups of this many shards, which are open together", ge=1
    )
    prefetch_batches: int = option(4, "steps prepared ahead by the background thread", ge=1)
    top_k: int | None = option(
        None, "read only so many entries of each target of a top-k cache, the largest", ge=1
    )
    tau_factor: float | None = option(
        None,
        "read a sampled cache as if every tau had been so many times larger: fewer entries, "
        "more noise, no bias",
        ge=1,
    )
    max_entries: int | None = option(
        None, "use only the largest entries of each top-k target; none uses all", ge=1
    )
