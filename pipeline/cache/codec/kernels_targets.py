"""Loops over entries, compiled by numba: targets split by kind of entry, and joined again.

Numba does not check bounds: callers make sure that lengths agree. Indices are unsigned, see
`kernels.py`.

Legend: N positions, E entries, K codes of a grid, G temperatures of the inclusion rule.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.jit import kernel

__all__ = [
    "MOST_SUMMED",
    "assemble",
    "largest_at_places",
    "lowest_shared",
    "places_of_largest",
    "rest_units",
    "take_apart",
    "values_of_top_k",
]

Ints = NDArray[np.integer[Any]]
Bytes = NDArray[np.uint8]
Reals = NDArray[np.floating[Any]]


@kernel
def take_apart(
    counts_N: Ints,
    ids_E: Ints,
    logprobs_E: Reals,
    inclusion_E: Reals,
    always_kept_N: Ints,
    always_kept_ids: Ints,
    always_kept_logprobs: Reals,
    sampled_N: Ints,
    sampled_ids: Ints,
    sampled_logprobs: Reals,
) -> tuple[int, int]:
    """Split entries into always-kept and sampled ones, and count both at each position.

    A position's first entry, the label's, is not written. Outputs have room for every entry.

    Returns:
        The numbers of always-kept and of sampled entries.
    """
    at = 0
    always_kept = 0
    sampled = 0
    for n in range(len(counts_N)):
        always_kept_before, sampled_before = always_kept, sampled
        for place in range(at + 1, at + counts_N[n]):
            entry, always_kept_to, sampled_to = (
                np.uint64(place),
                np.uint64(always_kept),
                np.uint64(sampled),
            )
            # Both are written and one is kept: a branch would be mispredicted too often.
            always_kept_ids[always_kept_to] = ids_E[entry]
            always_kept_logprobs[always_kept_to] = logprobs_E[entry]
            sampled_ids[sampled_to] = ids_E[entry]
            sampled_logprobs[sampled_to] = logprobs_E[entry]
            sure = int(inclusion_E[entry] >= 1)
            always_kept += sure
            sampled += 1 - sure
        always_kept_N[n] = always_kept - always_kept_before
        sampled_N[n] = sampled - sampled_before
        at += counts_N[n]
    return always_kept, sampled


@kernel
def rest_units(label_N: Bytes, codes_E: Bytes, counts_N: Ints, units_K: Ints) -> Ints:
    """Return 1 less the mass of label and always-kept entries, in units of 2^-16, at least 0."""
    rest_N = np.empty(len(counts_N), np.int64)
    entry = 0
    for position in range(len(counts_N)):
        rest = np.int64(65536) - units_K[label_N[position]]
        for _ in range(counts_N[position]):
            rest -= units_K[codes_E[entry]]
            entry += 1
        rest_N[position] = max(rest, 0)
    return rest_N


@kernel
def assemble(
    label_ids_N: Ints,
    label_N: Bytes,
    always_kept_counts_N: Ints,
    always_kept_ids: Ints,
    always_kept_codes: Bytes,
    sampled_counts_N: Ints,
    sampled_ids: Ints,
    sampled_codes: Bytes,
    dither_N: Reals,
    always_kept_K: Reals,
    sampled_step: Any,
    scale_NG: Reals,
    square_GK: Reals,
    always: float,
    least: float,
    ids_E: Ints,
    logprobs_E: Reals,
    inclusion_E: Reals,
) -> int:
    """Write all entries of each position, the label first; returns -1 or a damaged position.

    The probability with which code k was sampled is sqrt(sum_g scale[n, g] square[g, k]), at most
    `always`; one below `least` cannot have been sampled.
    """
    at = 0
    always_kept = 0
    sampled = 0
    temperatures = scale_NG.shape[1]
    highest = np.uint8(0)
    for code in sampled_codes:
        highest = max(highest, code)
    # One square root per code and position, vectorised: cheaper than one per entry, of which
    # there are 25.
    codes = (int(highest) + 8) & ~7
    square_K = np.empty(codes, np.float64)
    pi_K = np.empty(codes, np.float32)
    value_K = np.empty(codes, np.float32)
    for n in range(len(label_N)):
        ids_E[at] = label_ids_N[n]
        logprobs_E[at] = always_kept_K[label_N[n]]
        inclusion_E[at] = 1.0
        at += 1
        for _ in range(always_kept_counts_N[n]):
            ids_E[at] = always_kept_ids[always_kept]
            logprobs_E[at] = always_kept_K[always_kept_codes[always_kept]]
            inclusion_E[at] = 1.0
            always_kept += 1
            at += 1
        count = sampled_counts_N[n]
        if not count:
            continue
        dither = dither_N[n]
        scale = scale_NG[n, 0]
        for code in range(codes):
            square_K[code] = scale * square_GK[0, code]
            value_K[code] = -(np.float32(code) + dither) * sampled_step
        for g in range(1, temperatures):
            scale = scale_NG[n, g]
            for code in range(codes):
                square_K[code] += scale * square_GK[g, code]
        for code in range(codes):
            pi_K[code] = min(np.sqrt(square_K[code]), always)
        for place in range(count):
            entry = np.uint64(sampled + place)
            to = np.uint64(at + place)
            k = np.uint64(sampled_codes[entry])
            ids_E[to] = sampled_ids[entry]
            logprobs_E[to] = value_K[k]
            inclusion_E[to] = pi_K[k]
        if not pi_K[codes - 1] >= least:  # only then can any of them be too small
            for place in range(at, at + count):
                if not inclusion_E[place] >= least:
                    return n
        sampled += count
        at += count
    return -1


@kernel
def lowest_shared(counts_N: Ints, codes_E: Bytes, label_N: Bytes, shared_N: Ints) -> None:
    """Write how many entries of each position have its lowest code; a label, if any, is one."""
    at = 0
    for n in range(len(counts_N)):
        lowest = np.uint8(255)
        shared = 0
        if len(label_N):
            lowest = label_N[n]
            shared = 1
        for _ in range(counts_N[n]):
            code = codes_E[np.uint64(at)]
            at += 1
            if code < lowest:
                lowest = code
                shared = 1
            elif code == lowest:
                shared += 1
        shared_N[n] = shared


@kernel
def places_of_largest(
    counts_N: Ints, ids_E: Ints, codes_E: Bytes, label_N: Bytes, largest_N: Ints, place_N: Ints
) -> int:
    """Write each largest entry's place among those of the lowest code, the label first, then by id.

    `largest_N` is -1 for the label, or where there is no entry.

    Returns:
        -1, or the first position whose largest entry is not one of the lowest code.
    """
    at = 0
    for n in range(len(counts_N)):
        largest = largest_N[n]
        begin = at
        at += counts_N[n]
        lowest = np.uint8(255)
        found = largest < 0 and (len(label_N) > 0 or counts_N[n] == 0)
        if len(label_N):
            lowest = label_N[n]
        for entry in range(begin, at):
            lowest = min(lowest, codes_E[entry])
        place = 0
        if largest < 0:
            found = found and (len(label_N) == 0 or label_N[n] == lowest)
        else:
            if len(label_N) and label_N[n] == lowest:
                place = 1
            for entry in range(begin, at):
                if codes_E[entry] == lowest:
                    place += int(ids_E[entry] < largest)
                    found = found or ids_E[entry] == largest
        if not found:
            return n
        place_N[n] = place
    return -1


@kernel
def largest_at_places(
    counts_N: Ints, ids_E: Ints, codes_E: Bytes, label_N: Bytes, place_N: Ints, largest_N: Ints
) -> None:
    """Write the ids of the largest entries, the inverse of `places_of_largest`; ids ascend."""
    at = 0
    for n in range(len(counts_N)):
        begin = at
        at += counts_N[n]
        lowest = np.uint8(255)
        if len(label_N):
            lowest = label_N[n]
        for entry in range(begin, at):
            lowest = min(lowest, codes_E[entry])
        left = place_N[n]
        largest_N[n] = -1
        if len(label_N) and label_N[n] == lowest:
            if left == 0:
                continue
            left -= 1
        for entry in range(begin, at):
            if codes_E[entry] == lowest:
                if left == 0:
                    largest_N[n] = ids_E[entry]
                    break
                left -= 1


MOST_SUMMED = 129
"""Entries of a position that `values_of_top_k` adds up as numpy does; it divides longer ones."""


@kernel
def values_of_top_k(
    counts_N: Ints,
    codes_E: Bytes,
    values_K: Reals,
    probs_K: Reals,
    logprobs_E: Reals,
    largest_N: Ints,
    sums_N: Reals,
) -> None:
    """Write log p of all entries, and of each position its largest entry and the sum of p.

    The sum is that of `numpy.add.reduceat`, to the last bit: the first, and the others by eight
    running sums.

    Args:
        counts_N: entries of each position, at most `MOST_SUMMED`.
        codes_E: their codes.
        values_K: log p of each code, float32.
        probs_K: p of each code, float64.
        logprobs_E: out.
        largest_N: out, a place in E: of equal ones the first; 0 where there are no entries.
        sums_N: out.
    """
    begin = 0
    sums = np.empty(8, np.float64)
    for n in range(len(counts_N)):
        count = counts_N[n]
        largest_N[n], sums_N[n] = 0, 0.0
        if not count:
            continue
        best = begin
        high = values_K[codes_E[np.uint64(begin)]]
        logprobs_E[np.uint64(begin)] = high
        for place in range(begin + 1, begin + count):
            at = np.uint64(place)
            value = values_K[codes_E[at]]
            logprobs_E[at] = value
            if value > high:
                high, best = value, place
        largest_N[n] = best
        rest = begin + 1
        end = begin + count
        if count > 8:
            for lane in range(8):
                sums[lane] = probs_K[codes_E[np.uint64(rest + lane)]]
            rest += 8
            while rest + 8 <= end:
                for lane in range(8):
                    sums[lane] += probs_K[codes_E[np.uint64(rest + lane)]]
                rest += 8
            total = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + (
                (sums[4] + sums[5]) + (sums[6] + sums[7])
            )
        else:
            total = 0.0
        for place in range(rest, end):
            total += probs_K[codes_E[np.uint64(place)]]
        sums_N[n] = probs_K[codes_E[np.uint64(begin)]] + total
        begin = end
