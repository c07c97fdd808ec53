"""Which rows make which step: pure arithmetic of lengths, seed and step number; reads no data.

An epoch is an axis of packs that is cut into E equal lanes (`lanes.py`); a lane takes its shards in
a shuffled order and shuffles the packs within windows of a few shards. Step i has packs
[i G / E, (i + 1) G / E) of every lane; the packs that remain form a last, smaller step, spread over
the lanes. Ranks serve whole lanes, so that each reads its share of the cache, and the same packs
make the same step for any number of ranks that divides G.

With a budget of tokens instead of G, each row is a pack of its own and the axis is one of tokens.
A lane is split into S equal windows, and a row belongs to the window in which it starts. The number
of tokens does not depend on the epoch, so S does not either, and step i is found without the steps
before it.

At the start one pass over the lengths counts the packs of each shard. They are formed when their
window's turn comes: what is held is one window a lane.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.lanes import lane_count
from pipeline.data.order.schedule import Schedule
from pipeline.data.order.step import Pack, StepPlan
from pipeline.data.order.totals import SplitTotals, check_lengths, split_totals
from pipeline.data.order.window import Units, Window
from pipeline.data.source import RowSource

__all__ = ["TrainPlan"]


class TrainPlan:
    """The steps of a run, by number. Keeps one window of packs of each lane."""

    def __init__(
        self,
        source: RowSource,
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
        """Count the packs of every shard: 1 s for 50 million rows.

        Args:
            source: asked for rows and sizes of shards only.
            seed: any integer.
            packs_per_step: G, over all ranks and micro-batches; of no effect with `batch_tokens`.
            pack_length: most tokens of a pack.
            shuffle_shards: shards of all lanes together whose packs are shuffled at a time; at
                least one a lane.
            lanes: most lanes; see `lane_count`.
            packing: False gives each row its own pack.
            batch_tokens: most tokens of a step over all ranks and micro-batches, in place of
                `packs_per_step` and `packing`.
            totals: of the source, where they are known; its rows are counted once.

        Raises:
            CacheError: no rows.
            ConfigError: a row longer than a pack, or longer than a third of `batch_tokens`.
        """
        self.seed = seed
        self.packs_per_step = packs_per_step
        self.pack_length = pack_length
        self.batch_tokens = batch_tokens
        self.totals = totals = totals or split_totals(source)
        check_lengths(totals, pack_length, batch_tokens)
        self.lanes = lane_count(
            lanes,
            packs_per_step=packs_per_step,
            batch_tokens=batch_tokens,
            longest=totals.longest,
        )
        """E."""
        packing = packing and batch_tokens is None
        units_S = totals.packs_S(pack_length) if packing else totals.rows_S
        self.packs_per_epoch = int(units_S.sum())
        self._steps_per_epoch = self._count_steps()
        self._schedule = Schedule(
            units=Units(source, pack_length, packing, by_tokens=batch_tokens is not None),
            seed=seed,
            num_lanes=self.lanes,
            window_pieces=-(-shuffle_shards // self.lanes),
            units_S=units_S,
            sizes_S=units_S if batch_tokens is None else totals.span_S,
            steps_per_epoch=self._steps_per_epoch,
            packs_per_step=packs_per_step,
        )
        self._skipped: dict[int, int] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of every epoch, the last and smaller one included."""
        return self._steps_per_epoch

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all rows."""
        return self.totals.tokens

    @property
    def fill(self) -> float:
        """Tokens over capacity of all packs, or of all steps: 1.0 wastes nothing."""
        if self.batch_tokens is None:
            capacity = self.packs_per_epoch * self.pack_length
        else:
            capacity = self._steps_per_epoch * self.batch_tokens
        return self.totals.tokens / capacity

    def skip_shard(self, shard: int, from_step: int) -> None:
        """Drop the packs of a shard from `from_step` on; the steps stay the same otherwise."""
        self._skipped[shard] = min(from_step, self._skipped.get(shard, from_step))

    def is_skipped(self, shard: int, step: int) -> bool:
        """Whether a step skips the packs of a shard."""
        return self._skipped.get(shard, step + 1) <= step

    def step(self, step: int) -> StepPlan:
        """Return step number `step` of the run, counted from 0; costs one window of each lane."""
        epoch, index = divmod(step, self._steps_per_epoch)
        skipped = [shard for shard in self._skipped if self.is_skipped(shard, step)]
        packs: list[Pack] = []
        spans: list[int] = []
        lane_ends: list[int] = []
        tokens = loss_tokens = skipped_rows = 0
        for number, lane in enumerate(self._schedule.lanes(epoch)):
            for window, chosen in self._schedule.chosen(
                epoch, number, lane, self._schedule.range_of(lane, index)
            ):
                kept = chosen
                if skipped:
                    kept = chosen[~np.isin(window.shard_U[chosen], skipped)]
                    rows_U = window.num_rows_U
                    skipped_rows += int(rows_U[chosen].sum() - rows_U[kept].sum())
                packs += window.packs(kept)
                spans += window.span_U[kept].tolist()
                tokens += int(window.tokens_U[kept].sum())
                loss_tokens += int(window.loss_tokens_U[kept].sum())
            lane_ends.append(len(packs))
        return StepPlan(
            step=step,
            epoch=epoch,
            packs=tuple(packs),
            num_tokens=tokens,
            num_loss_tokens=loss_tokens,
            pack_tokens=None if self.batch_tokens is None else tuple(spans),
            num_skipped_rows=skipped_rows,
            lane_ends=tuple(lane_ends),
        )

    def shards_ahead(self, step: int, lanes: range, *, steps: int) -> list[int]:
        """Return the shards of some lanes' windows in use, and those that come next.

        Args:
            step: the one in use.
            lanes: of a rank.
            steps: how far to look ahead. At most as many shards again as a window of each lane
                holds are returned: steps that are short beside it are many shards.

        Returns:
            In the order of their use.
        """
        wanted = sorted(
            found for number in lanes for found in self._windows_ahead(number, step, steps)
        )
        room = len(lanes) * self._schedule.window_pieces
        in_use, ahead = dict[int, None](), dict[int, None]()
        for first, number, window in wanted:
            epoch = first // self._steps_per_epoch
            lane = self._schedule.lanes(epoch)[number]
            for shard in lane.shards_K[lane.pieces_of(window)].tolist():
                if first <= step:
                    in_use[shard] = None
                elif shard not in in_use and len(ahead) < room:
                    ahead[shard] = None
        return [shard for shard in [*in_use, *ahead] if not self.is_skipped(shard, step)]

    def skipped_before(self, step: int) -> tuple[int, int]:
        """Return rows and tokens of skipped shards that the first `step` steps skip."""
        rows = tokens = 0
        for shard, first in self._skipped.items():
            for epoch in range(first // self._steps_per_epoch, -(-step // self._steps_per_epoch)):
                start = max(first - epoch * self._steps_per_epoch, 0)
                stop = min(step - epoch * self._steps_per_epoch, self._steps_per_epoch)
                if (start, stop) == (0, self._steps_per_epoch):
                    rows += int(self.totals.rows_S[shard])
                    tokens += int(self.totals.tokens_S[shard])
                    continue
                for window, inside in self._of_shard(epoch, shard, start, stop):
                    rows += int(window.num_rows_U[inside].sum())
                    tokens += int(window.tokens_U[inside].sum())
        return rows, tokens

    def tokens_before(self, step: int) -> int:
        """Return the tokens of the first `step` steps, repeats counted, skipped shards not."""
        epoch, index = divmod(step, self._steps_per_epoch)
        tokens = epoch * self.totals.tokens - self.skipped_before(step)[1]
        if index == 0:
            return tokens
        for number, lane in enumerate(self._schedule.lanes(epoch)):
            stop = self._schedule.range_of(lane, index)[0]
            tokens += self._schedule.tokens_up_to(epoch, number, lane, stop, self.totals.tokens_S)
        return tokens

    def _count_steps(self) -> int:
        if self.batch_tokens is None:
            return -(-self.packs_per_epoch // self.packs_per_step)
        # A window of w tokens holds the rows that start in it: at most w + longest - 1 tokens. So
        # each lane stays within its share of the budget, and a rank within its own.
        longest = max(self.totals.longest, 1)
        width = self.batch_tokens // self.lanes - longest + 1
        size = int(self.totals.span_S.sum())
        if self.lanes > 1:
            # The longest that a lane can be: a cut moves to the next row.
            size = -(-size // self.lanes) + longest - 1
        return -(-size // width)

    def _windows_ahead(self, number: int, step: int, steps: int) -> Iterator[tuple[int, int, int]]:
        """Yield the windows of a lane from a step on: (first step, lane, window)."""
        now, index = divmod(step, self._steps_per_epoch)
        for epoch in (now, now + 1):
            lane = self._schedule.lanes(epoch)[number]
            start = self._schedule.range_of(lane, index)[0]
            for window in range(max(lane.window_at(start), 0), len(lane.window_starts) - 1):
                first = self._schedule.step_at(lane, int(lane.window_starts[window]))
                if epoch * self._steps_per_epoch + first > step + steps:
                    return
                if lane.window_starts[window + 1] > start:
                    yield epoch * self._steps_per_epoch + first, number, window
            index = 0

    def _of_shard(
        self, epoch: int, shard: int, start: int, stop: int
    ) -> Iterator[tuple[Window, NDArray[np.bool_]]]:
        """Yield the windows of an epoch that hold a shard, and its units in steps start to stop."""
        for number, lane in enumerate(self._schedule.lanes(epoch)):
            first, last = (self._schedule.range_of(lane, index)[0] for index in (start, stop))
            if stop == self._steps_per_epoch:
                last = lane.size
            for index in {
                int(k) // self._schedule.window_pieces
                for k in np.flatnonzero(lane.shards_K == shard)
            }:
                window = self._schedule.window(epoch, number, lane, index)
                places_U = window.starts_U + lane.window_starts[index]
                inside = (window.shard_U == shard) & (first <= places_U) & (places_U < last)
                yield window, inside
