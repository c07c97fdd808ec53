"""Which units of a lane a step takes, and where they are: lanes by epoch, steps on them, windows.

Shapes: S shards, U units of a window (packs, or rows), K pieces of a lane.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.lanes import Axis, Lane
from pipeline.data.order.permutation import derive_key, permutation
from pipeline.data.order.window import Piece, Units, Window, shard_order

__all__ = ["Schedule"]

# Salts of the derived keys; part of the order, never change. 2 and 5 are in window.py.
_SHARDS, _PACKS, _LANES, _FLIP = 1, 3, 4, 6

_FEW = 8
"""With fewer shards a lane than this they are dealt to lanes anew in each epoch: so few would
otherwise keep the same company. With more, a lane keeps its shards, so that a node's disk holds
copies of its share and not, after some epochs, of the whole cache."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The lanes of any epoch and the windows of any lane; keeps two epochs, one window a lane."""

    units: Units
    seed: int
    num_lanes: int
    window_pieces: int
    """Pieces of a lane whose units are shuffled together."""
    units_S: Ints
    sizes_S: Ints
    """Of each shard, in packs or tokens."""
    steps_per_epoch: int
    packs_per_step: int
    _epochs: dict[int, list[Lane]] = field(default_factory=dict)
    _windows: dict[int, tuple[tuple[int, int], Window]] = field(default_factory=dict)

    def lanes(self, epoch: int) -> list[Lane]:
        """Return the lanes of an epoch; two epochs are kept, as reading ahead needs the next."""
        if epoch not in self._epochs:
            shards = len(self.units_S)
            anew = epoch if shards < _FEW * self.num_lanes else 0
            axis = Axis(
                permutation(shards, derive_key(self.seed, anew, _SHARDS)),
                self.sizes_S,
                self.units_S,
            )
            for other in [other for other in self._epochs if abs(other - epoch) > 1]:
                del self._epochs[other]
            self._epochs[epoch] = axis.cut(
                self.num_lanes,
                split=lambda shard, offset: self._split(epoch, shard, offset),
                window_pieces=self.window_pieces,
                keys=lambda lane: derive_key(self.seed, epoch, _LANES, lane),
                flip=bool(derive_key(self.seed, epoch, _FLIP) & 1),
            )
        return self._epochs[epoch]

    def range_of(self, lane: Lane, index: int) -> tuple[int, int]:
        """Return where a step of an epoch starts and stops in a lane, in packs or in tokens."""
        if not self.units.by_tokens:
            each = self.packs_per_step // self.num_lanes
            return min(index * each, lane.size), min((index + 1) * each, lane.size)
        steps = self.steps_per_epoch
        return -(-lane.size * index // steps), -(-lane.size * (index + 1) // steps)

    def step_at(self, lane: Lane, position: int) -> int:
        """Return which step of an epoch takes the unit that starts at a position of a lane."""
        if not self.units.by_tokens:
            return position // (self.packs_per_step // self.num_lanes)
        return position * self.steps_per_epoch // lane.size

    def chosen(
        self, epoch: int, number: int, lane: Lane, bounds: tuple[int, int]
    ) -> Iterator[tuple[Window, Ints]]:
        """Yield the units of a lane between two positions, window by window."""
        start, stop = bounds
        if start >= stop:
            return
        index = lane.window_at(start)
        while index < len(lane.window_starts) - 1 and lane.window_starts[index] < stop:
            window = self.window(epoch, number, lane, index)
            at = lane.window_starts[index]
            first, last = np.searchsorted(window.starts_U, [start - at, stop - at])
            yield window, np.arange(first, last)
            index += 1

    def window(self, epoch: int, number: int, lane: Lane, index: int) -> Window:
        """Return a window of a lane; the last one of each lane is kept."""
        held = self._windows.get(number)
        if held is None or held[0] != (epoch, index):
            pieces = lane.pieces_of(index)
            shards = lane.shards_K[pieces]
            parts = (shards, lane.first_K[pieces], lane.stop_K[pieces], self.units_S[shards])
            window = Window.form(
                self.units,
                [Piece(*part) for part in zip(*(p.tolist() for p in parts), strict=True)],
                seed=self.seed,
                epoch=epoch,
                key=derive_key(self.seed, epoch, _PACKS, number, index),
            )
            self._windows[number] = held = ((epoch, index), window)
        return held[1]

    def tokens_up_to(self, epoch: int, number: int, lane: Lane, stop: int, tokens_S: Ints) -> int:
        """Return the tokens of a lane's first units, before place `stop` of it.

        Whole shards are sums; units are formed where `stop` is, and of shards that lanes share.

        Args:
            epoch: from 0.
            number: of the lane.
            lane: one of `lanes(epoch)`.
            stop: a place in the lane.
            tokens_S: of every shard.
        """
        tokens = 0
        for index in range(len(lane.window_starts) - 1):
            if lane.window_starts[index] >= stop:
                break
            pieces = lane.pieces_of(index)
            shards = lane.shards_K[pieces]
            whole = lane.stop_K[pieces] - lane.first_K[pieces] == self.units_S[shards]
            if whole.all() and lane.window_starts[index + 1] <= stop:
                tokens += int(tokens_S[shards].sum())
                continue
            window = self.window(epoch, number, lane, index)
            last = np.searchsorted(window.starts_U, stop - lane.window_starts[index])
            tokens += int(window.tokens_U[:last].sum())
        return tokens

    def _split(self, epoch: int, shard: int, offset: int) -> tuple[int, int]:
        """Return the first unit of a shard that starts at an offset or later, and where."""
        if not self.units.by_tokens:
            return offset, offset
        order = shard_order(int(self.units_S[shard]), seed=self.seed, epoch=epoch, shard=shard)
        span_R = np.maximum(self.units.source.shard_sizes(shard)[:, 0], 1)[order]
        ends_R = np.cumsum(span_R, dtype=np.int64)
        unit = int(np.searchsorted(ends_R - span_R, offset))
        return unit, int(ends_R[unit - 1])
