"""Loops over entries, compiled by numba: targets taken apart by kind, and put together again.

Numba checks no bounds: callers make sure that lengths agree. Indices are unsigned, see
`kernels.py`.

Legend: N positions, E entries, K levels of a grid, G temperatures of the law.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.jit import kernel

__all__ = ["assemble", "rest_units", "take_apart"]

Ints = NDArray[np.integer[Any]]
Bytes = NDArray[np.uint8]
Reals = NDArray[np.floating[Any]]


@kernel
def take_apart(
    counts_N: Ints,
    ids_E: Ints,
    logprobs_E: Reals,
    inclusion_E: Reals,
    certain_N: Ints,
    certain_ids: Ints,
    certain_logprobs: Reals,
    drawn_N: Ints,
    drawn_ids: Ints,
    drawn_logprobs: Reals,
) -> tuple[int, int]:
    """Write certain and drawn entries apart, and how many of each a position has.

    A position's first entry, which is gold's, goes nowhere. Outputs have room for every entry.

    Returns:
        How many certain and how many drawn entries there are.
    """
    at = 0
    certain = 0
    drawn = 0
    for n in range(len(counts_N)):
        certain_before, drawn_before = certain, drawn
        for place in range(at + 1, at + counts_N[n]):
            entry, certain_to, drawn_to = np.uint64(place), np.uint64(certain), np.uint64(drawn)
            # Both are written, and one is kept: which of them it is no branch can foresee.
            certain_ids[certain_to] = ids_E[entry]
            certain_logprobs[certain_to] = logprobs_E[entry]
            drawn_ids[drawn_to] = ids_E[entry]
            drawn_logprobs[drawn_to] = logprobs_E[entry]
            sure = int(inclusion_E[entry] >= 1)
            certain += sure
            drawn += 1 - sure
        certain_N[n] = certain - certain_before
        drawn_N[n] = drawn - drawn_before
        at += counts_N[n]
    return certain, drawn


@kernel
def rest_units(gold_N: Bytes, levels_E: Bytes, counts_N: Ints, units_K: Ints) -> Ints:
    """Return what gold and certain entries leave of 1, in units of 2^-16, at least 0."""
    rest_N = np.empty(len(counts_N), np.int64)
    entry = 0
    for position in range(len(counts_N)):
        rest = np.int64(65536) - units_K[gold_N[position]]
        for _ in range(counts_N[position]):
            rest -= units_K[levels_E[entry]]
            entry += 1
        rest_N[position] = max(rest, 0)
    return rest_N


@kernel
def assemble(
    gold_ids_N: Ints,
    gold_N: Bytes,
    certain_counts_N: Ints,
    certain_ids: Ints,
    certain_levels: Bytes,
    drawn_counts_N: Ints,
    drawn_ids: Ints,
    drawn_levels: Bytes,
    dither_N: Reals,
    certain_K: Reals,
    drawn_step: Any,
    scale_NG: Reals,
    square_GK: Reals,
    always: float,
    least: float,
    ids_E: Ints,
    logprobs_E: Reals,
    inclusion_E: Reals,
) -> int:
    """Write gold, certain and drawn entries of each position; returns -1 or a damaged position.

    The probability with which level k was drawn is sqrt(sum_g scale[n, g] square[g, k]), at most
    `always`; one below `least` cannot have been drawn.
    """
    at = 0
    certain = 0
    drawn = 0
    temperatures = scale_NG.shape[1]
    highest = np.uint8(0)
    for level in drawn_levels:
        highest = max(highest, level)
    # One root a level and position, in whole vectors: cheaper than one an entry, of which there
    # are 25.
    levels = (int(highest) + 8) & ~7
    square_K = np.empty(levels, np.float64)
    pi_K = np.empty(levels, np.float32)
    value_K = np.empty(levels, np.float32)
    for n in range(len(gold_N)):
        ids_E[at] = gold_ids_N[n]
        logprobs_E[at] = certain_K[gold_N[n]]
        inclusion_E[at] = 1.0
        at += 1
        for _ in range(certain_counts_N[n]):
            ids_E[at] = certain_ids[certain]
            logprobs_E[at] = certain_K[certain_levels[certain]]
            inclusion_E[at] = 1.0
            certain += 1
            at += 1
        count = drawn_counts_N[n]
        if not count:
            continue
        dither = dither_N[n]
        scale = scale_NG[n, 0]
        for level in range(levels):
            square_K[level] = scale * square_GK[0, level]
            value_K[level] = -(np.float32(level) + dither) * drawn_step
        for g in range(1, temperatures):
            scale = scale_NG[n, g]
            for level in range(levels):
                square_K[level] += scale * square_GK[g, level]
        for level in range(levels):
            pi_K[level] = min(np.sqrt(square_K[level]), always)
        for place in range(count):
            entry = np.uint64(drawn + place)
            to = np.uint64(at + place)
            k = np.uint64(drawn_levels[entry])
            ids_E[to] = drawn_ids[entry]
            logprobs_E[to] = value_K[k]
            inclusion_E[to] = pi_K[k]
        if not pi_K[levels - 1] >= least:  # only then can one of them be
            for place in range(at, at + count):
                if not inclusion_E[place] >= least:
                    return n
        drawn += count
        at += count
    return -1
