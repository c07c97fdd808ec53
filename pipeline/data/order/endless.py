"""The packs of one cache in an endless order, by position: what a mixture takes from each.

The order is that of `plan.py`: lanes of shards, windows that are shuffled. But here a step may take
any number of packs, and goes on in the next epoch where one ends: positions count packs (or tokens)
from the start of the run. Packs are dealt to the lanes in turn.

Shapes: S shards of the cache, U units of a window (packs, or rows).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.lanes import Lane
from pipeline.data.order.schedule import Schedule
from pipeline.data.order.window import Units, Window
from pipeline.data.source import RowSource, SizeSource

__all__ = ["EndlessOrder", "ShardRange"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ShardRange:
    """The shards of one cache of a mixture, numbered from 0."""

    source: SizeSource
    first: int
    """Its first shard in the source."""

    def shard_sizes(self, shard: int) -> NDArray[np.int32]:
        """Return tokens and supervised tokens of every row of a shard, [rows, 2]."""
        return self.source.shard_sizes(self.first + shard)


class _Stretch(NamedTuple):
    """Part of an epoch: positions start to stop of it."""

    epoch: int
    start: int
    stop: int


class EndlessOrder:
    """One cache's packs by position; keeps one window of each lane."""

    def __init__(
        self,
        source: RowSource,
        *,
        first_shard: int,
        units_S: Ints,
        sizes_S: Ints,
        tokens_S: Ints,
        rows_S: Ints,
        seed: int,
        pack_length: int,
        packing: bool,
        by_tokens: bool,
        lanes: int,
        window_pieces: int,
    ) -> None:
        """Take what is known of the cache's shards; reads no row.

        Args:
            source: of the mixture; asked for sizes only.
            first_shard: the cache's first one in it.
            units_S: packs (or rows) of each shard.
            sizes_S: of each shard in positions: packs, or tokens.
            tokens_S: of each shard.
            rows_S: of each shard.
            seed: of the order.
            pack_length: most tokens of a pack.
            packing: False gives each row its own pack.
            by_tokens: positions count tokens.
            lanes: stretches that an epoch is cut into.
            window_pieces: shards of a lane whose packs are shuffled together.
        """
        self.first_shard = first_shard
        self.lanes = lanes
        self.window_pieces = window_pieces
        self.size = int(sizes_S.sum())
        """Of an epoch, in packs or tokens."""
        self.tokens_S, self.rows_S, self._units_S = tokens_S, rows_S, units_S
        self._schedule = Schedule(
            units=Units(ShardRange(source, first_shard), pack_length, packing, by_tokens),
            seed=seed,
            num_lanes=lanes,
            window_pieces=window_pieces,
            units_S=units_S,
            sizes_S=sizes_S,
            steps_per_epoch=1,
            packs_per_step=lanes,
        )

    def between(self, start: int, stop: int) -> Iterator[tuple[int, Window, Ints]]:
        """Yield lane, window and units of the packs at positions start to stop."""
        for stretch in self._stretches(start, stop):
            lanes = self._schedule.lanes(stretch.epoch)
            for number, lane in enumerate(lanes):
                bounds = self._bounds(lanes, number, stretch)
                for window, units in self._schedule.chosen(stretch.epoch, number, lane, bounds):
                    yield number, window, units

    def shards_between(self, start: int, stop: int, lanes: range) -> list[int]:
        """Return the shards of some lanes' windows at these positions, about in their order."""
        found: dict[int, None] = {}
        for stretch in self._stretches(start, stop):
            all_lanes = self._schedule.lanes(stretch.epoch)
            windows = []
            for number in lanes:
                lane = all_lanes[number]
                first, last = self._bounds(all_lanes, number, stretch)
                if first >= last:
                    continue
                index = lane.window_at(first)
                while index < len(lane.window_starts) - 1 and lane.window_starts[index] < last:
                    begin = max(int(lane.window_starts[index]) - first, 0) / (last - first)
                    windows.append((begin, number, index))
                    index += 1
            for _, number, index in sorted(windows):
                lane = all_lanes[number]
                found |= dict.fromkeys(lane.shards_K[lane.pieces_of(index)].tolist())
            if len(found) == np.count_nonzero(self._units_S):
                break
        return list(found)

    def tokens_before(self, position: int) -> int:
        """Return the tokens of all packs before a position; whole epochs and shards are sums."""
        epoch, inside = divmod(position, self.size)
        tokens = epoch * int(self.tokens_S.sum())
        if not inside:
            return tokens
        lanes = self._schedule.lanes(epoch)
        for number, lane in enumerate(lanes):
            stop = self._bounds(lanes, number, _Stretch(epoch, 0, inside))[1]
            tokens += self._schedule.tokens_up_to(epoch, number, lane, stop, self.tokens_S)
        return tokens

    def of_shard(self, shard: int, start: int, stop: int) -> tuple[int, int]:
        """Return the rows and tokens of a shard at positions start to stop, repeats counted."""
        rows = tokens = 0
        for stretch in self._stretches(start, stop):
            if (stretch.start, stretch.stop) == (0, self.size):
                rows += int(self.rows_S[shard])
                tokens += int(self.tokens_S[shard])
                continue
            first = stretch.epoch * self.size
            for _, window, units in self.between(first + stretch.start, first + stretch.stop):
                its = units[window.shard_U[units] == shard]
                rows += int(window.num_rows_U[its].sum())
                tokens += int(window.tokens_U[its].sum())
        return rows, tokens

    def _stretches(self, start: int, stop: int) -> Iterator[_Stretch]:
        while start < stop:
            epoch, inside = divmod(start, self.size)
            end = min(self.size, inside + stop - start)
            yield _Stretch(epoch, inside, end)
            start += end - inside

    def _bounds(self, lanes: list[Lane], number: int, stretch: _Stretch) -> tuple[int, int]:
        """Return where a stretch of an epoch starts and stops in a lane."""
        return (
            self._in_lane(lanes, number, stretch.start),
            self._in_lane(lanes, number, stretch.stop),
        )

    def _in_lane(self, lanes: list[Lane], number: int, position: int) -> int:
        """Return how many of an epoch's first so many packs (or tokens) are a lane's."""
        if self._schedule.units.by_tokens:
            return -(-lanes[number].size * position // self.size)
        # Lanes differ by one pack at most: the last round goes to those that have one more.
        full = min(lane.size for lane in lanes)
        rounds, more = divmod(position, len(lanes))
        if rounds < full:
            return rounds + (number < more)
        if lanes[number].size == full:
            return full
        longer_before = sum(lane.size > full for lane in lanes[:number])
        return full + (longer_before < position - full * len(lanes))
