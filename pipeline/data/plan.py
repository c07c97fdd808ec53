"""Which rows make which step: pure arithmetic of lengths, seed and step number; reads no data.

An epoch permutes the shards, cuts them into groups, and permutes the packs within a group. It is
cut into steps of G packs; the packs that remain form a last, smaller step. A step's packs are
split contiguously and as evenly as possible into world * accumulation micro-batches, so the same
packs make the same step for any number of ranks that divides G.

Shapes: R rows of all shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order import derive_key, permutation
from pipeline.data.packing import ShardPacks
from pipeline.data.source import RowSource
from pipeline.errors import CacheError, ConfigError

__all__ = ["Pack", "StepPlan", "TrainPlan"]

_SHARDS, _ROWS, _PACKS = 1, 2, 3  # salts of the derived keys; part of the order, never change


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows of one shard that share a pack, in order."""

    shard: int
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step: its packs on all ranks."""

    step: int
    epoch: int
    packs: tuple[Pack, ...]
    num_tokens: int
    """Of all ranks."""
    num_counted_tokens: int
    """Of all ranks; what the loss is divided by. Can be 0 in a corpus with such rows."""

    def micro_batches(self, *, rank: int, world: int, accumulation: int) -> list[tuple[Pack, ...]]:
        """Return the packs of each of a rank's `accumulation` micro-batches; some may be empty."""
        parts = world * accumulation
        cuts = [len(self.packs) * i // parts for i in range(parts + 1)]
        mine = range(rank * accumulation, (rank + 1) * accumulation)
        return [self.packs[cuts[i] : cuts[i + 1]] for i in mine]


class TrainPlan:
    """The steps of a run, by number. Keeps the packs of the last group it was asked for."""

    def __init__(
        self,
        source: RowSource,
        *,
        seed: int,
        packs_per_step: int,
        pack_length: int,
        shuffle_shards: int,
        packing: bool = True,
    ) -> None:
        """Pack every shard once: about 1 s for a million rows.

        Args:
            source: asked for shard sizes, lengths and counted tokens only.
            seed: any integer.
            packs_per_step: G, over all ranks and micro-batches.
            pack_length: most tokens of a pack.
            shuffle_shards: shards of a group.
            packing: False gives each row its own pack.

        Raises:
            CacheError: no rows.
            ConfigError: a row longer than a pack.
        """
        self.seed = seed
        self.packs_per_step = packs_per_step
        self.pack_length = pack_length
        self._shuffle_shards = shuffle_shards
        self._lengths_R = np.asarray(source.lengths())
        self._counted_R = np.asarray(source.counted_counts())
        self._starts = np.cumsum([0, *source.shard_rows()])
        _check(self._lengths_R, self._starts, pack_length)
        self._shards = [
            ShardPacks(self._lengths_R[start:stop], pack_length, packing=packing)
            for start, stop in zip(self._starts, self._starts[1:], strict=False)
        ]
        self.packs_per_epoch = sum(len(shard) for shard in self._shards)
        self._epoch_groups: tuple[int, list[NDArray[np.int64]], NDArray[np.int64]] | None = None
        self._group_packs: tuple[tuple[int, int], list[Pack]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of every epoch, the last and smaller one included."""
        return -(-self.packs_per_epoch // self.packs_per_step)

    @property
    def fill(self) -> float:
        """Tokens over capacity of all packs: 1.0 wastes nothing."""
        return float(self._lengths_R.sum()) / (self.packs_per_epoch * self.pack_length)

    def step(self, step: int) -> StepPlan:
        """Return step number `step` of the run, counted from 0; costs one group of shards."""
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.packs_per_step
        stop = min(start + self.packs_per_step, self.packs_per_epoch)
        packs = tuple(self._packs(epoch, start, stop))
        rows = np.array([self._starts[pack.shard] + row for pack in packs for row in pack.rows])
        return StepPlan(
            step=step,
            epoch=epoch,
            packs=packs,
            num_tokens=int(self._lengths_R[rows].sum()),
            num_counted_tokens=int(self._counted_R[rows].sum()),
        )

    def _packs(self, epoch: int, start: int, stop: int) -> list[Pack]:
        """Return packs `start` to `stop` of an epoch; they may reach over several groups."""
        groups, bounds = self._groups(epoch)
        packs: list[Pack] = []
        group = int(np.searchsorted(bounds, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(bounds[group + 1]))
            offset = int(bounds[group])
            packs += self._group(epoch, group, groups[group])[start - offset : end - offset]
            start, group = end, group + 1
        return packs

    def _groups(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """Return the shards of each group and the first pack of each, one more than groups."""
        if self._epoch_groups is None or self._epoch_groups[0] != epoch:
            shards = permutation(len(self._shards), derive_key(self.seed, epoch, _SHARDS))
            size = self._shuffle_shards
            groups = [shards[i : i + size] for i in range(0, len(shards), size)]
            sizes = [sum(len(self._shards[s]) for s in group) for group in groups]
            self._epoch_groups = (epoch, groups, np.cumsum([0, *sizes]))
        return self._epoch_groups[1:]

    def _group(
        self, epoch: int, group: int, shards: Sequence[int] | NDArray[np.int64]
    ) -> list[Pack]:
        """Return the shuffled packs of one group."""
        if self._group_packs is None or self._group_packs[0] != (epoch, group):
            packs = [
                Pack(int(shard), tuple(rows.tolist()))
                for shard in shards
                for rows in self._shards[shard].rows(
                    derive_key(self.seed, epoch, _ROWS, int(shard))
                )
            ]
            order = permutation(len(packs), derive_key(self.seed, epoch, _PACKS, group))
            self._group_packs = ((epoch, group), [packs[i] for i in order])
        return self._group_packs[1]


def _check(lengths_R: NDArray[np.int32], starts: NDArray[np.int64], pack_length: int) -> None:
    if not len(lengths_R):
        raise CacheError(
            "the cache has no training rows",
            expected="at least one",
            do="cache a larger corpus, or hold out less of it",
        )
    assert starts[-1] == len(lengths_R), "shard_rows and lengths disagree"
    longest = int(lengths_R.max())
    if longest > pack_length:
        raise ConfigError(
            f"pack_length is {pack_length}, but the cache has a row of {longest} tokens",
            expected=f"at least {longest}",
            do="raise data.pack_length, or leave it unset to take the cache's max_length",
        )
