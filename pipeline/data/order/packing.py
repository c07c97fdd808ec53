"""First-fit decreasing, from a histogram of lengths: which lengths share a pack.

Rows of one shard are packed together, so a pack reads one shard, and the number of packs depends
on lengths alone: it is the same in every epoch, whatever the shuffle.

Shapes: R rows of one shard, P packs.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.permutation import permutation

__all__ = ["ShardPacks", "pack_lengths"]


class ShardPacks:
    """The packs of one shard: fixed slots of lengths, to be filled with rows.

    Rows of equal length swap slots from epoch to epoch; packs do not change otherwise.
    """

    def __init__(self, lengths_R: NDArray[np.int32], pack_length: int, *, packing: bool) -> None:
        """Pack the rows, or give each its own pack."""
        order = np.argsort(-lengths_R.astype(np.int64), kind="stable")
        self._rows_by_length_R = order
        sorted_R = lengths_R[order]
        packs = (
            pack_lengths(lengths_R, pack_length)
            if packing
            else [[int(length)] for length in sorted_R]
        )
        flat = np.array([length for pack in packs for length in pack], np.int64)
        # Slot s takes the next unused row of its length: both sides sorted alike line up.
        self._slot_of_R = np.argsort(-flat, kind="stable")
        self._sorted_lengths_R = sorted_R
        self._bounds = np.cumsum([0] + [len(pack) for pack in packs])

    def __len__(self) -> int:
        """P."""
        return len(self._bounds) - 1

    def rows(self, key: int) -> list[NDArray[np.int64]]:
        """Return the rows of each pack; `key` decides which of the equally long goes where."""
        shuffled = permutation(len(self._rows_by_length_R), key)
        rows = self._rows_by_length_R[shuffled]
        # Stable: within one length the shuffled order stays.
        by_length = np.argsort(-self._sorted_lengths_R[shuffled].astype(np.int64), kind="stable")
        slots = np.empty(len(rows), np.int64)
        slots[self._slot_of_R] = rows[by_length]
        return [slots[start:stop] for start, stop in pairwise(self._bounds)]


def pack_lengths(lengths_R: NDArray[np.int32], pack_length: int) -> list[list[int]]:
    """Return packs of lengths, each summing to at most `pack_length`.

    The result is that of first-fit decreasing (Johnson 1973: at most 11/9 of the optimum), built
    one pack at a time: the first pack receives, in decreasing order, whatever still fits. Working
    on counts of equal lengths, a pack's pattern is repeated as long as there are rows for it.
    """
    sizes, counts = np.unique(lengths_R, return_counts=True)
    available: list[int] = sizes.tolist()
    left: dict[int, int] = dict(zip(available, counts.tolist(), strict=True))
    packs: list[list[int]] = []
    while available:
        pattern: dict[int, int] = {}
        space = pack_length
        end = len(available)
        while (end := bisect_right(available, space, 0, end)) > 0:
            length = available[end - 1]
            # At least one: a zero-length row would fit without end.
            times = min(left[length], space // max(length, 1))
            pattern[length] = times
            space -= times * length
            end -= 1
        if not pattern:
            raise ValueError(f"a row of {available[-1]} tokens in packs of {pack_length}")
        repeats = min(left[length] // times for length, times in pattern.items())
        one = [length for length, times in pattern.items() for _ in range(times)]
        packs.extend(list(one) for _ in range(repeats))
        for length, times in pattern.items():
            left[length] -= repeats * times
            if left[length] == 0:
                available.pop(bisect_right(available, length) - 1)
    return packs
