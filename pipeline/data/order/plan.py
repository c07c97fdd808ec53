"""Which rows make which step: pure arithmetic of lengths, seed and step number; reads no data.

An epoch permutes the shards, splits them into groups, and permutes the packs within a group. It is
split into steps of G packs; the packs that remain form a last, smaller step. A step's packs are
split contiguously and as evenly as possible into world_size * accumulation micro-batches, so the
same packs make the same step for any number of ranks that divides G.

With a budget of tokens instead of G, each row is a pack of its own, and the epoch is an axis of
tokens that is split into S equal windows; a row belongs to the window in which it starts. The
number of tokens does not depend on the epoch, so S does not either, and step i is found without
the steps before it. Micro-batches are windows of the step in the same way.

Shapes: R rows of all shards, P packs of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.packing import ShardPacks
from pipeline.data.order.permutation import derive_key, permutation
from pipeline.data.source import RowSource
from pipeline.errors import CacheError, ConfigError

__all__ = ["Pack", "StepPlan", "TrainPlan", "check_lengths"]

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
    num_loss_tokens: int
    """Of all ranks; what the loss is divided by. Can be 0 in a corpus with such rows."""
    pack_tokens: tuple[int, ...] | None = None
    """Of each pack, where micro-batches are windows of tokens; None: as many packs in each."""
    num_skipped_rows: int = 0
    """Rows of shards that the run skips."""

    def micro_batches(
        self, *, rank: int, world_size: int, accumulation: int
    ) -> list[tuple[Pack, ...]]:
        """Return the packs of each of a rank's `accumulation` micro-batches; some may be empty."""
        parts = world_size * accumulation
        if self.pack_tokens is None:
            cuts = [len(self.packs) * i // parts for i in range(parts + 1)]
        else:
            starts = np.cumsum([0, *self.pack_tokens])
            windows = [-(-int(starts[-1]) * i // parts) for i in range(parts + 1)]
            cuts = np.searchsorted(starts[:-1], windows).tolist()
        mine = range(rank * accumulation, (rank + 1) * accumulation)
        return [self.packs[cuts[i] : cuts[i + 1]] for i in mine]


@dataclass(frozen=True, slots=True)
class _Group:
    """The shuffled packs of one group of shards, on the axis that steps are windows of."""

    packs: list[Pack]
    starts_P: NDArray[np.int64]
    """Where each pack starts, from the group's start: in packs, or in tokens."""


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
        batch_tokens: int | None = None,
    ) -> None:
        """Pack every shard once: about 1 s for a million rows.

        Args:
            source: asked for shard sizes, lengths and supervised tokens only.
            seed: any integer.
            packs_per_step: G, over all ranks and micro-batches; of no effect with `batch_tokens`.
            pack_length: most tokens of a pack.
            shuffle_shards: shards of a group.
            packing: False gives each row its own pack.
            batch_tokens: most tokens of a step over all ranks and micro-batches, in place of
                `packs_per_step` and `packing`.

        Raises:
            CacheError: no rows.
            ConfigError: a row longer than a pack, or longer than a third of `batch_tokens`.
        """
        self.seed = seed
        self.packs_per_step = packs_per_step
        self.pack_length = pack_length
        self.batch_tokens = batch_tokens
        self._shuffle_shards = shuffle_shards
        self._lengths_R = np.asarray(source.lengths())
        # On the axis of tokens a row without any would start where no window is.
        self._sizes_R = np.maximum(self._lengths_R, 1)
        self._loss_tokens_R = np.asarray(source.loss_token_counts())
        self._starts = np.cumsum([0, *source.shard_rows()])
        assert self._starts[-1] == len(self._lengths_R), "shard_rows and lengths disagree"
        check_lengths(self._lengths_R, pack_length, batch_tokens)
        bounds = list(zip(self._starts, self._starts[1:], strict=False))
        packing = packing and batch_tokens is None
        self._shards = [
            ShardPacks(self._lengths_R[start:stop], pack_length, packing=packing)
            for start, stop in bounds
        ]
        self.packs_per_epoch = sum(len(shard) for shard in self._shards)
        if batch_tokens is None:
            self._shard_sizes = [len(shard) for shard in self._shards]
            self._steps_per_epoch = -(-self.packs_per_epoch // packs_per_step)
        else:
            self._shard_sizes = [int(self._sizes_R[a:b].sum()) for a, b in bounds]
            self._steps_per_epoch = _windows(self._sizes_R, batch_tokens)
        self._axis_tokens = int(self._sizes_R.sum())
        self._skipped: dict[int, int] = {}
        self._epoch_groups: tuple[int, list[NDArray[np.int64]], NDArray[np.int64]] | None = None
        self._group_packs: tuple[tuple[int, int], _Group] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of every epoch, the last and smaller one included."""
        return self._steps_per_epoch

    @property
    def fill(self) -> float:
        """Tokens over capacity of all packs, or of all steps: 1.0 wastes nothing."""
        if self.batch_tokens is None:
            capacity = self.packs_per_epoch * self.pack_length
        else:
            capacity = self._steps_per_epoch * self.batch_tokens
        return float(self._lengths_R.sum()) / capacity

    def skip_shard(self, shard: int, from_step: int) -> None:
        """Drop the packs of a shard from `from_step` on; the steps stay the same otherwise."""
        self._skipped[shard] = min(from_step, self._skipped.get(shard, from_step))

    def is_skipped(self, shard: int, step: int) -> bool:
        """Whether a step skips the packs of a shard."""
        return self._skipped.get(shard, step + 1) <= step

    def step(self, step: int) -> StepPlan:
        """Return step number `step` of the run, counted from 0; costs one group of shards."""
        planned = self._packs_of(step)
        packs = tuple(pack for pack in planned if not self.is_skipped(pack.shard, step))
        rows = np.array(
            [self._starts[pack.shard] + row for pack in packs for row in pack.rows], np.int64
        )
        lengths = self._lengths_R[rows]
        by_tokens = self.batch_tokens is not None
        return StepPlan(
            step=step,
            epoch=step // self._steps_per_epoch,
            packs=packs,
            num_tokens=int(lengths.sum()),
            num_loss_tokens=int(self._loss_tokens_R[rows].sum()),
            pack_tokens=tuple(self._sizes_R[rows].tolist()) if by_tokens else None,
            num_skipped_rows=sum(len(pack.rows) for pack in planned) - len(rows),
        )

    def shards_ahead(self, step: int) -> list[int]:
        """Return the shards of the step's group and of the next one, in the order of their use."""
        epoch, index = divmod(step, self._steps_per_epoch)
        groups, bounds = self._groups(epoch)
        group = int(np.searchsorted(bounds, self._window(index)[0], side="right")) - 1
        ahead = groups[group : group + 2]
        if len(ahead) == 1:
            ahead += self._groups(epoch + 1)[0][:1]
        return [int(s) for shards in ahead for s in shards if not self.is_skipped(int(s), step)]

    def _packs_of(self, step: int) -> list[Pack]:
        """Return the packs of a step; they may reach over several groups."""
        epoch, index = divmod(step, self._steps_per_epoch)
        start, stop = self._window(index)
        groups, bounds = self._groups(epoch)
        packs: list[Pack] = []
        group = int(np.searchsorted(bounds, start, side="right")) - 1
        while group < len(groups) and bounds[group] < stop:
            found = self._group(epoch, group, groups[group])
            first, last = np.searchsorted(
                found.starts_P, [start - bounds[group], stop - bounds[group]]
            )
            packs += found.packs[first:last]
            group += 1
        return packs

    def _window(self, index: int) -> tuple[int, int]:
        """Return where a step of an epoch starts and stops, in packs or in tokens."""
        if self.batch_tokens is None:
            return index * self.packs_per_step, (index + 1) * self.packs_per_step
        tokens, steps = self._axis_tokens, self._steps_per_epoch
        return -(-tokens * index // steps), -(-tokens * (index + 1) // steps)

    def _groups(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """Return the shards of each group and where each group starts, one more than groups."""
        if self._epoch_groups is None or self._epoch_groups[0] != epoch:
            shards = permutation(len(self._shards), derive_key(self.seed, epoch, _SHARDS))
            size = self._shuffle_shards
            groups = [shards[i : i + size] for i in range(0, len(shards), size)]
            sizes = [sum(self._shard_sizes[s] for s in group) for group in groups]
            self._epoch_groups = (epoch, groups, np.cumsum([0, *sizes]))
        return self._epoch_groups[1:]

    def _group(self, epoch: int, group: int, shards: Sequence[int] | NDArray[np.int64]) -> _Group:
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
            packs = [packs[i] for i in order]
            if self.batch_tokens is None:
                starts_P = np.arange(len(packs))
            else:
                rows = np.array([self._starts[pack.shard] + pack.rows[0] for pack in packs], int)
                starts_P = np.cumsum(self._sizes_R[rows], dtype=np.int64) - self._sizes_R[rows]
            self._group_packs = ((epoch, group), _Group(packs, starts_P))
        return self._group_packs[1]


def _windows(sizes_R: NDArray[np.int32], batch_tokens: int) -> int:
    """Return the fewest equal windows whose rows never exceed the budget.

    A window of w tokens holds the rows that start in it: at most w + longest - 1 tokens.
    """
    return -(-int(sizes_R.sum()) // (batch_tokens - int(sizes_R.max()) + 1))


def check_lengths(lengths_R: NDArray[np.int32], pack_length: int, batch_tokens: int | None) -> None:
    """Reject rows that no step can hold.

    Args:
        lengths_R: tokens of every row.
        pack_length: most tokens of a pack.
        batch_tokens: most tokens of a step, in place of packs.

    Raises:
        CacheError: no rows.
        ConfigError: a row longer than a pack, or longer than a third of `batch_tokens`.
    """
    if not len(lengths_R):
        raise CacheError(
            "the cache has no training rows",
            expected="at least one",
            do="cache a larger corpus, or hold out less of it",
        )
    longest = int(lengths_R.max())
    if batch_tokens is None and longest > pack_length:
        raise ConfigError(
            f"pack_length is {pack_length}, but the cache has a row of {longest} tokens",
            expected=f"at least {longest}",
            do="raise data.pack_length, or leave it unset to take the cache's max_length",
        )
    # Below, a window can be shorter than a row, and then be a step without any.
    if batch_tokens is not None and 3 * longest > batch_tokens:
        raise ConfigError(
            f"data.batch_tokens is {batch_tokens}, but the cache has a row of {longest} tokens",
            expected=f"at least three times as much, {3 * longest}",
            do="raise it, or leave it unset for packs of data.pack_length",
        )
