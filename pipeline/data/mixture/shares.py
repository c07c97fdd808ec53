"""Whose turn it is in a mixture: an exact, even interleaving of caches, by arithmetic.

Weights become whole numbers of packs in a period; within it the caches take turns by Tijdeman's
algorithm ("The chairman assignment problem", 1980): after any n packs each cache has had its share
of them to less than one pack, so nothing drifts, and how many each has had is looked up.

Shapes: C caches, P packs of a period.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

__all__ = ["Shares", "make_shares"]

_LONGEST_PERIOD = 10_000
"""Weights whose exact period is longer are rounded to so many parts: an error of a share of at
most 1e-4, and half of that on average."""


@dataclass(frozen=True, slots=True)
class Shares:
    """The turns of C caches."""

    counts_C: tuple[int, ...]
    """Packs of each cache in a period; at least one."""
    before_PC: NDArray[np.int64]
    """Packs of each cache among the first p of a period; [P + 1, C]."""

    @property
    def period(self) -> int:
        """P."""
        return len(self.before_PC) - 1

    def before(self, packs: int) -> tuple[int, ...]:
        """Return how many of the first so many packs are each cache's; they sum to it."""
        whole, rest = divmod(packs, self.period)
        return tuple(
            whole * count + int(more)
            for count, more in zip(self.counts_C, self.before_PC[rest], strict=True)
        )

    def tokens_before(self, tokens_per_step: int, steps: int) -> tuple[int, ...]:
        """Return each cache's tokens of so many steps, where shares are of tokens."""
        return tuple(steps * tokens_per_step * count // self.period for count in self.counts_C)


def make_shares(weights_C: Sequence[float]) -> Shares:
    """Return the turns of caches with these weights, all above 0."""
    counts_C = _whole(weights_C)
    period, caches = sum(counts_C), len(counts_C)
    before_PC = np.zeros((period + 1, caches), np.int64)
    had = [0] * caches
    slack = max(2 * caches - 2, 1)
    for pack in range(1, period + 1):
        # Behind by at least 1 / slack; of these, who would be a whole pack behind first.
        behind = [count * pack - period * have for count, have in zip(counts_C, had, strict=True)]
        waiting = [c for c in range(caches) if slack * behind[c] >= period]
        chosen = min(
            waiting,
            key=lambda c: (Fraction((slack - 1) * period - slack * behind[c], counts_C[c]), c),
        )
        had[chosen] += 1
        before_PC[pack] = had
    return Shares(counts_C, before_PC)


def _whole(weights_C: Sequence[float]) -> tuple[int, ...]:
    """Return whole numbers in the proportion of the weights, as they are written in decimals."""
    exact = [Fraction(str(float(weight))) for weight in weights_C]
    parts = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(part.denominator for part in parts))
    if period <= _LONGEST_PERIOD:
        return tuple(int(part * period) for part in parts)
    # By largest remainder, each at least one.
    wanted = [part * _LONGEST_PERIOD for part in parts]
    counts = [max(1, math.floor(number)) for number in wanted]
    order = sorted(range(len(wanted)), key=lambda c: (counts[c] - wanted[c], c))
    for place in range(_LONGEST_PERIOD - sum(counts)):
        counts[order[place % len(order)]] += 1
    return tuple(counts)
