"""Lanes: equal stretches of an epoch, each read by one rank, whose packs every step takes alike.

All shards lie end to end on an axis, in an order that the seed decides, and the axis is cut into
equal lanes. A step takes as many packs from every lane, so a rank that serves whole lanes reads
their shards and no others, and for any number of ranks a step is the same. A shard that a cut goes
through is shared by two neighbours; both come to it at the same end of the epoch, the first cut at
the start, the second at the end, and so on, so that one rank reads it once. In between, a lane
takes its shards in an order that is new in each epoch.

Shapes: S shards, K pieces of a lane (a shard, or the part of it that is the lane's).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.permutation import permutation

__all__ = ["Axis", "Lane", "lane_count"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Lane:
    """The pieces of one lane in one epoch, in the order of their use.

    Positions are counted from the lane's start, in packs or in tokens.
    """

    shards_K: Ints
    first_K: Ints
    """The first unit of each shard that is the lane's, in the shard's shuffled order."""
    stop_K: Ints
    sizes_K: Ints
    """Of each piece, in packs or tokens."""
    window_pieces: int
    """Pieces of a window, in which units are shuffled."""
    window_starts: Ints
    """Where each window starts, and where the lane ends: one more than windows."""

    @property
    def size(self) -> int:
        """In packs or tokens."""
        return int(self.window_starts[-1])

    def window_at(self, position: int) -> int:
        """Return the window that holds a position."""
        return int(np.searchsorted(self.window_starts, position, side="right")) - 1

    def pieces_of(self, window: int) -> slice:
        """Return which pieces make a window."""
        return slice(window * self.window_pieces, (window + 1) * self.window_pieces)


Split = Callable[[int, int], tuple[int, int]]
"""(shard, offset) -> the first unit that starts there or later, and where it starts."""


@dataclass(frozen=True, slots=True)
class Axis:
    """All shards end to end, in an order."""

    order_S: Ints
    sizes_S: Ints
    """Of each shard, in packs or tokens."""
    units_S: Ints
    """Of each shard: packs, or rows."""

    def cut(
        self,
        lanes: int,
        *,
        split: Split,
        window_pieces: int,
        keys: Callable[[int], int],
        flip: bool,
    ) -> list[Lane]:
        """Return the lanes.

        Args:
            lanes: their number.
            split: where a cut may go through a shard.
            window_pieces: pieces of a window.
            keys: of each lane's order of its shards.
            flip: shared shards come at the other end of the epoch.
        """
        ends_S = np.cumsum(self.sizes_S[self.order_S])
        total = int(ends_S[-1]) if len(ends_S) else 0
        cuts = [(0, 0, 0)]
        for number in range(1, lanes):
            place = total * number // lanes
            at = int(np.searchsorted(ends_S, place, side="right"))
            shard = int(self.order_S[at])
            offset = place - int(ends_S[at] - self.sizes_S[shard])
            unit, before = split(shard, offset) if offset else (0, 0)
            whole = unit == self.units_S[shard]
            cuts.append((at + 1, 0, 0) if whole else (at, unit, before))
        cuts.append((len(self.order_S), 0, 0))
        return [
            self._lane(cuts[i], cuts[i + 1], window_pieces, keys(i), head_first=(i % 2 == 0) ^ flip)
            for i in range(lanes)
        ]

    def _lane(
        self,
        start: tuple[int, int, int],
        stop: tuple[int, int, int],
        window_pieces: int,
        key: int,
        *,
        head_first: bool,
    ) -> Lane:
        (at, unit, before), (last, end_unit, end_before) = start, stop
        shards_K = self.order_S[at : last + (end_unit > 0)]
        first_K = np.zeros(len(shards_K), np.int64)
        stop_K, sizes_K = self.units_S[shards_K].copy(), self.sizes_S[shards_K].copy()
        head, tail = unit > 0, end_unit > 0
        if tail:
            stop_K[-1], sizes_K[-1] = end_unit, end_before
        if head and len(shards_K):
            first_K[0] = unit
            sizes_K[0] -= before
        order_K = np.arange(len(shards_K))
        if len(order_K) > 1:
            first, middle, end = np.split(order_K, [int(head), len(order_K) - int(tail)])
            middle = middle[permutation(len(middle), key)]
            order_K = np.concatenate([first, middle, end] if head_first else [end, middle, first])
        order_K = order_K[stop_K[order_K] > first_K[order_K]]
        sizes_K = sizes_K[order_K]
        starts = np.concatenate([[0], np.cumsum(sizes_K)]).astype(np.int64)
        return Lane(
            shards_K=shards_K[order_K],
            first_K=first_K[order_K],
            stop_K=stop_K[order_K],
            sizes_K=sizes_K,
            window_pieces=window_pieces,
            window_starts=np.append(starts[:-1:window_pieces], starts[-1]),
        )


def lane_count(most: int, *, packs_per_step: int, batch_tokens: int | None, longest: int) -> int:
    """Return the number of lanes of a run.

    With packs the largest number that divides the packs of a step, so that a step takes as many
    from every lane. With a budget of tokens each lane has a share of it, which must hold four of
    the longest rows: its steps are shorter than the share by up to one of them. The number then
    divides `most`.

    Args:
        most: the setting.
        packs_per_step: over all ranks.
        batch_tokens: of a step, in place of packs.
        longest: tokens of the longest row.
    """
    if batch_tokens is None:
        fitting = [d for d in range(1, most + 1) if packs_per_step % d == 0]
    else:
        fitting = [
            d for d in range(1, most + 1) if most % d == 0 and 4 * d * longest <= batch_tokens
        ]
    return max(fitting, default=1)
