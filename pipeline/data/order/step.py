"""One optimizer step: the packs of all ranks, and which of them are a rank's.

Shapes: P packs of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

__all__ = ["Pack", "StepPlan", "lanes_of_rank"]


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows of one shard that share a pack, in order."""

    shard: int
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step: its packs on all ranks, lane after lane."""

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
    lane_ends: tuple[int, ...] = ()
    """How many packs the lanes up to each have together; none: all are of one lane."""

    def micro_batches(
        self, *, rank: int, world_size: int, accumulation: int
    ) -> list[tuple[Pack, ...]]:
        """Return the packs of each of a rank's `accumulation` micro-batches; some may be empty.

        A rank has whole lanes where the ranks divide them. Else the step is cut evenly, and two
        ranks may share a lane: the same step, with some shards read twice.
        """
        lanes = len(self.lane_ends)
        if not lanes or lanes % world_size:
            first, stop = 0, len(self.packs)
            parts, mine = world_size * accumulation, rank * accumulation
        else:
            ends = (0, *self.lane_ends)
            each = lanes // world_size
            first, stop = ends[rank * each], ends[(rank + 1) * each]
            parts, mine = accumulation, 0
        cuts = self._cuts(first, stop, parts)[mine : mine + accumulation + 1]
        return [self.packs[a:b] for a, b in pairwise(cuts)]

    def _cuts(self, first: int, stop: int, parts: int) -> Sequence[int]:
        """Cut packs into parts, as evenly as possible: by number, or by tokens."""
        if self.pack_tokens is None:
            return [first + (stop - first) * i // parts for i in range(parts + 1)]
        starts = np.cumsum([0, *self.pack_tokens[first:stop]])
        windows = [-(-int(starts[-1]) * i // parts) for i in range(parts + 1)]
        return [first + int(cut) for cut in np.searchsorted(starts[:-1], windows)]


def lanes_of_rank(lanes: int, *, rank: int, world_size: int, by_tokens: bool) -> range:
    """Return the lanes that a rank reads: its own, or those that it may share with neighbours.

    Args:
        lanes: of the plan.
        rank: this one.
        world_size: ranks that read different data.
        by_tokens: a step is cut by tokens where ranks do not divide the lanes.
    """
    # A cut by tokens that falls at a lane's end is a few rows off it, on either side.
    near = 1 if by_tokens and lanes % world_size else 0
    start = (4 * lanes * rank - near * world_size) // (4 * world_size)
    stop = -(-(4 * lanes * (rank + 1) + near * world_size) // (4 * world_size))
    return range(max(start, 0), min(stop, lanes))
