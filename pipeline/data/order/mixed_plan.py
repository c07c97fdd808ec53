"""The steps of a mixture of caches: a fixed part of every step from each, by arithmetic.

Packs of all caches are numbered through; which cache has number n is decided by `Shares`, so that
after any n each has had its part of them to less than one pack. Step i has the numbers [i G, (i +
1) G), whatever the number of ranks, and each cache goes on through its own endless order
(`endless.py`): a small one is repeated, a large one is not finished, and no step is short. An epoch
of the mixture is as many packs as all caches have together.

With a budget of tokens each cache has its part of the tokens instead, along its own axis of tokens.

The packs of a step are ordered by their lanes' places, so that a rank, which takes a stretch of
them, reads about the same part of every cache in each step.

Shapes: C caches, S shards of all, U units of a window.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.mixture.rows import MixedRows
from pipeline.data.mixture.shares import Shares, make_shares
from pipeline.data.order.endless import EndlessOrder
from pipeline.data.order.lanes import lane_count
from pipeline.data.order.permutation import derive_key
from pipeline.data.order.step import Pack, StepPlan
from pipeline.data.order.totals import SplitTotals, check_lengths, split_totals
from pipeline.data.source import RowSource
from pipeline.errors import CacheError, ConfigError, Mistakes

__all__ = ["MixedPlan"]

_CACHES = 7  # salt of the caches' keys; part of the order and never changes; see schedule.py


class _Taken(NamedTuple):
    """Units of one window in a step."""

    place: float
    """Of their lane among the lanes of its cache, from 0 to 1."""
    cache: int
    packs: list[Pack]
    spans: list[int]


class MixedPlan:
    """The steps of a run over a mixture, by number; see `TrainPlan` for one cache."""

    def __init__(
        self,
        source: RowSource,
        mixture: MixedRows,
        *,
        seed: int,
        packs_per_step: int,
        pack_length: int,
        shuffle_shards: int,
        lanes: int,
        packing: bool = True,
        batch_tokens: int | None = None,
        totals: SplitTotals | None = None,
    ) -> None:
        """Count the packs of every shard.

        Args:
            source: the training rows, asked for sizes of shards only.
            mixture: what is below it.
            seed: any integer.
            packs_per_step: G, over all ranks and micro-batches; of no effect with `batch_tokens`.
            pack_length: most tokens of a pack.
            shuffle_shards: shards of all lanes together whose packs are shuffled at a time; at
                least one a lane.
            lanes: most lanes of all caches together, but one for each.
            packing: False gives each row its own pack.
            batch_tokens: most tokens of a step over all ranks and micro-batches, in place of
                `packs_per_step` and `packing`.
            totals: of the source, where they are known.

        Raises:
            CacheError: a cache has no training rows.
            ConfigError: a row longer than a pack, or a cache's part of `batch_tokens` is below
                three of its longest rows.
        """
        self.packs_per_step, self.pack_length = packs_per_step, pack_length
        self.batch_tokens, self._mixture = batch_tokens, mixture
        self.totals = totals = totals or split_totals(source)
        self.shares: Shares = make_shares([part.weight for part in mixture.parts])
        check_lengths(totals, pack_length, None if batch_tokens is None else 3 * totals.longest)
        packing = packing and batch_tokens is None
        units_S = totals.packs_S(pack_length) if packing else totals.rows_S
        sizes_S = units_S if batch_tokens is None else totals.span_S
        longest_C = _longest(source, mixture)
        self._check_parts(mixture, units_S, longest_C)
        parts = [count / self.shares.period for count in self.shares.counts_C]
        lanes_C = [
            max(1, min(int(lanes * part), int(packs_per_step * part)))
            if batch_tokens is None
            else lane_count(
                max(1, int(lanes * part)),
                packs_per_step=packs_per_step,
                batch_tokens=int(batch_tokens * part),
                longest=longest,
            )
            for part, longest in zip(parts, longest_C, strict=True)
        ]
        self.orders: list[EndlessOrder] = []
        for cache, lanes_of_cache in enumerate(lanes_C):
            its = slice(mixture.first_C[cache], mixture.first_C[cache + 1])
            self.orders.append(
                EndlessOrder(
                    source,
                    first_shard=its.start,
                    units_S=units_S[its],
                    sizes_S=sizes_S[its],
                    tokens_S=totals.tokens_S[its],
                    rows_S=totals.rows_S[its],
                    seed=derive_key(seed, _CACHES, cache),
                    pack_length=pack_length,
                    packing=packing,
                    by_tokens=batch_tokens is not None,
                    lanes=lanes_of_cache,
                    window_pieces=-(-shuffle_shards // sum(lanes_C)),
                )
            )
        self.lanes = max(lanes_C)
        """Places of a step by which ranks share it: the lanes of the cache with most of them."""
        self._tokens_per_step = 0
        if batch_tokens is not None:
            # A window holds the rows that start in it, and can be longer by one less a token.
            over = sum(n * longest for n, longest in zip(lanes_C, longest_C, strict=True))
            self._tokens_per_step = batch_tokens - over
        self._size = sum(order.size for order in self.orders)
        self._skipped: dict[int, int] = {}

    def _check_parts(
        self, mixture: MixedRows, units_S: NDArray[np.int64], longest_C: list[int]
    ) -> None:
        mistakes = Mistakes()
        for cache, part in enumerate(mixture.parts):
            its = slice(mixture.first_C[cache], mixture.first_C[cache + 1])
            if not int(units_S[its].sum()):
                with mistakes.collected():
                    raise CacheError(
                        f"{part.tag}: the cache has no training rows",
                        expected="at least one",
                        do="leave it out of cache_dir, or change data.filter",
                    )
            share = self.shares.counts_C[cache] / self.shares.period
            if (
                self.batch_tokens is not None
                and int(self.batch_tokens * share) < 3 * longest_C[cache]
            ):
                with mistakes.collected():
                    raise ConfigError(
                        f"data.batch_tokens is {self.batch_tokens}, of which {part.tag} has "
                        f"{int(self.batch_tokens * share)}, but it has a row of "
                        f"{longest_C[cache]} tokens",
                        expected=f"at least three times as much for it, {3 * longest_C[cache]}",
                        do="raise it or the cache's weight, or leave it unset for packs of "
                        "data.pack_length",
                    )
        mistakes.raise_any()

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which as many packs (or tokens) are taken as all caches have together."""
        if self.batch_tokens is None:
            return -(-self._size // self.packs_per_step)
        return -(-self._size // self._tokens_per_step)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of `steps_per_epoch` steps, about."""
        return round(
            sum(
                self._size * count / self.shares.period * int(order.tokens_S.sum()) / order.size
                for count, order in zip(self.shares.counts_C, self.orders, strict=True)
            )
        )

    @property
    def fill(self) -> float:
        """Tokens over capacity of all packs, or of all steps: 1.0 wastes nothing."""
        capacity = self.batch_tokens or self.packs_per_step * self.pack_length
        return self.tokens_per_epoch / (self._size * capacity / self._each())

    def _each(self) -> int:
        return self.packs_per_step if self.batch_tokens is None else self._tokens_per_step

    def positions(self, step: int) -> tuple[int, ...]:
        """Return where in its endless order each cache stands before a step."""
        if self.batch_tokens is None:
            return self.shares.before(step * self.packs_per_step)
        return self.shares.tokens_before(self._tokens_per_step, step)

    def epochs(self, step: int) -> tuple[float, ...]:
        """Return how often each cache has been gone through before a step."""
        positions = self.positions(step)
        return tuple(p / order.size for p, order in zip(positions, self.orders, strict=True))

    def skip_shard(self, shard: int, from_step: int) -> None:
        """Skip a shard's packs from `from_step` on; the steps stay the same otherwise."""
        self._skipped[shard] = min(from_step, self._skipped.get(shard, from_step))

    def is_skipped(self, shard: int, step: int) -> bool:
        """Whether a step skips the packs of a shard."""
        return self._skipped.get(shard, step + 1) <= step

    def step(self, step: int) -> StepPlan:
        """Return step number `step` of the run, counted from 0; costs one window of each lane."""
        taken: list[_Taken] = []
        tokens = loss_tokens = skipped_rows = 0
        ranges = zip(self.positions(step), self.positions(step + 1), strict=True)
        for cache, ((start, stop), order) in enumerate(zip(ranges, self.orders, strict=True)):
            skipped = [
                shard - order.first_shard for shard in self._skipped if self.is_skipped(shard, step)
            ]
            for lane, window, units in order.between(start, stop):
                kept = units
                if skipped:
                    kept = units[~np.isin(window.shard_U[units], skipped)]
                    rows_U = window.num_rows_U
                    skipped_rows += int(rows_U[units].sum() - rows_U[kept].sum())
                packs = [
                    Pack(pack.shard + order.first_shard, pack.rows) for pack in window.packs(kept)
                ]
                place = (lane + 0.5) / order.lanes
                taken.append(_Taken(place, cache, packs, window.span_U[kept].tolist()))
                tokens += int(window.tokens_U[kept].sum())
                loss_tokens += int(window.loss_tokens_U[kept].sum())
        taken.sort(key=lambda part: (part.place, part.cache))
        spans = tuple(span for part in taken for span in part.spans)
        return StepPlan(
            step=step,
            epoch=step // self.steps_per_epoch,
            packs=tuple(pack for part in taken for pack in part.packs),
            num_tokens=tokens,
            num_loss_tokens=loss_tokens,
            pack_tokens=None if self.batch_tokens is None else spans,
            num_skipped_rows=skipped_rows,
        )

    def shards_ahead(self, step: int, lanes: range, *, steps: int) -> list[int]:
        """Return the shards that a step uses in some lanes, and those that come next.

        Args:
            step: the one in use.
            lanes: of a rank, of `self.lanes`; those of the caches at the same places are taken.
            steps: how far to look ahead.

        Returns:
            In the order of their use; at most as many shards ahead as windows of the lanes hold.
        """
        in_use: list[int] = []
        ahead: list[int] = []
        now, then, end = (self.positions(s) for s in (step, step + 1, step + 1 + steps))
        for cache, order in enumerate(self.orders):
            first = lanes.start * order.lanes // self.lanes
            last = -(-lanes.stop * order.lanes // self.lanes)
            mine = range(first, max(last, first + 1))
            used = order.shards_between(now[cache], then[cache], mine)
            room = len(mine) * order.window_pieces
            coming = [
                shard
                for shard in order.shards_between(then[cache], end[cache], mine)
                if shard not in set(used)
            ]
            in_use += [order.first_shard + shard for shard in used]
            ahead += [order.first_shard + shard for shard in coming[:room]]
        return [shard for shard in [*in_use, *ahead] if not self.is_skipped(shard, step)]

    def skipped_before(self, step: int) -> tuple[int, int]:
        """Return rows and tokens of skipped shards that the first `step` steps skip."""
        rows = tokens = 0
        for shard, first in self._skipped.items():
            if first >= step:
                continue
            cache, local = self._mixture.place(shard)
            start, stop = self.positions(first)[cache], self.positions(step)[cache]
            more = self.orders[cache].of_shard(local, start, stop)
            rows, tokens = rows + more[0], tokens + more[1]
        return rows, tokens

    def tokens_before(self, step: int) -> int:
        """Return the tokens of the first `step` steps, repeats counted, skipped shards not."""
        positions = zip(self.positions(step), self.orders, strict=True)
        return sum(order.tokens_before(p) for p, order in positions) - self.skipped_before(step)[1]


def _longest(source: RowSource, mixture: MixedRows) -> list[int]:
    """Return the tokens of each cache's longest row; 0 without rows."""
    return [
        max(
            (
                int(source.shard_sizes(shard)[:, 0].max(initial=0))
                for shard in range(mixture.first_C[cache], mixture.first_C[cache + 1])
            ),
            default=0,
        )
        for cache in range(len(mixture.parts))
    ]
