"""The largest entry of a position: which it is, and its log p restored in a top-k.

Entries near the largest often share its quantisation code: of a top-k at one position in sixty, of
sampled targets at one in fourteen. There, and only there, a byte says which of those that share the
lowest code is the teacher's likeliest token.

In a top-k the largest is restored as 1 minus the others and the tail: for a confident teacher
(p = 0.97) its quantisation code alone is off by 0.04 in probability, the remainder by less than
0.001. FORMAT.md, 8.6.

Legend: S rows, N positions, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CacheError

__all__ = ["LARGEST_COLUMN", "Candidates", "packed_places", "top_k_logprobs", "unpacked_places"]

LARGEST_COLUMN = "largest"
_I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The always-kept entries of N positions, of which the largest is one of the lowest code.

    Under an inclusion rule the label is one of the entries, and comes first of those.
    """

    counts_N: NDArray[np.integer[Any]]
    """Entries of each position, without the label."""
    ids_E: NDArray[np.int32]
    codes_E: NDArray[np.uint8]
    """Quantisation codes of their log p."""
    label_N: NDArray[np.uint8]
    """Codes of the labels; empty where the label is no entry."""

    def shared_N(self) -> _I64:
        """Return how many entries of each position have its lowest code."""
        from pipeline.cache.codec.kernels_targets import lowest_shared

        shared_N = np.empty(len(self.counts_N), np.int64)
        lowest_shared(self.counts_N, self.codes_E, self.label_N, shared_N)
        return shared_N

    def places(self, largest_N: NDArray[np.int32]) -> _I64:
        """Return the place of each position's largest entry among those, by ascending id [N].

        Args:
            largest_N: its id; -1: the label, or no entry at all.

        Raises:
            CacheError: it is not among them.
        """
        from pipeline.cache.codec.kernels_targets import places_of_largest

        place_N = np.empty(len(self.counts_N), np.int64)
        wrong = places_of_largest(
            self.counts_N, self.ids_E, self.codes_E, self.label_N, largest_N, place_N
        )
        if wrong >= 0:
            raise CacheError(
                "the likeliest token of a position is not its largest always-kept entry"
            )
        return place_N

    def at(self, place_N: _I64) -> NDArray[np.int32]:
        """Return the ids at these places, the inverse of `places`.

        Args:
            place_N: each below `shared_N`, or 0; the entries' ids must ascend.
        """
        from pipeline.cache.codec.kernels_targets import largest_at_places

        largest_N = np.empty(len(place_N), np.int32)
        largest_at_places(self.counts_N, self.ids_E, self.codes_E, self.label_N, place_N, largest_N)
        return largest_N


def packed_places(
    place_N: _I64, shared_N: _I64, positions_S: _I64
) -> tuple[NDArray[np.uint8], _I64]:
    """Return the bytes of the places where there is a choice, and each row's number of bytes.

    Seven bits a byte, the lowest first; the top bit says that another byte of the number follows.

    Args:
        place_N: from `Candidates.places`.
        shared_N: from `Candidates.shared_N`.
        positions_S: of each row.
    """
    row_N = np.repeat(np.arange(len(positions_S)), positions_S)
    chosen_N = shared_N > 1
    left, row = place_N[chosen_N], row_N[chosen_N]
    size = 1 + (left >= 1 << 7).astype(np.int64) + (left >= 1 << 14)
    ends = np.cumsum(size)
    data = np.zeros(int(size.sum()), np.uint8)
    for step in range(3):
        there = size > step
        byte = (left[there] >> 7 * step) & 127
        more = size[there] > step + 1
        data[ends[there] - size[there] + step] = byte | more.astype(np.int64) << 7
    return data, np.bincount(row, size, len(positions_S)).astype(np.int64)


def unpacked_places(
    data: NDArray[np.uint8], lengths_S: _I64, shared_N: _I64, positions_S: _I64
) -> _I64:
    """Return each position's place, the inverse of `packed_places`; 0 where there is no choice.

    Raises:
        CacheError: the bytes cannot have been written by the encoder.
    """
    row_N = np.repeat(np.arange(len(positions_S)), positions_S)
    chosen_N = shared_N > 1
    ends = np.flatnonzero(data < 128)
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    row_of_byte = np.repeat(np.arange(len(lengths_S)), lengths_S)
    wanted_S = np.bincount(row_N[chosen_N], minlength=len(positions_S))
    found_S = np.bincount(row_of_byte[ends], minlength=len(positions_S))
    last_S = np.cumsum(lengths_S)[lengths_S > 0] - 1
    if (
        not np.array_equal(wanted_S, found_S)
        or (data[last_S] >= 128).any()
        or (len(ends) and (ends - starts).max() > 2)
    ):
        raise CacheError("the column largest does not fit the entries")
    place_N = np.zeros(len(shared_N), np.int64)
    if len(ends):
        at = np.arange(len(data)) - np.repeat(starts, ends - starts + 1)
        place_N[chosen_N] = np.add.reduceat((data & 127).astype(np.int64) << 7 * at, starts)
    if (place_N[chosen_N] >= shared_N[chosen_N]).any():
        raise CacheError("the column largest names an entry that is not there")
    return place_N


def top_k_logprobs(
    codes_E: NDArray[np.uint8],
    counts_N: NDArray[np.int32],
    tail_N: NDArray[np.float32],
    values_K: NDArray[np.float32],
    step: float,
) -> NDArray[np.float32]:
    """Return log p of a top-k's entries; the largest is 1 - tail - others, within one grid step.

    Args:
        codes_E: of the entries.
        counts_N: entries of each position.
        tail_N: the mass outside them.
        values_K: log p of each code.
        step: of the grid.
    """
    from pipeline.cache.codec.kernels_targets import MOST_SUMMED, values_of_top_k

    probs_K = np.exp(values_K.astype(np.float64))  # there are as many values as codes
    filled = counts_N > 0
    if counts_N.max(initial=0) > MOST_SUMMED:
        logprobs_E, at, sums_N = _by_numpy(codes_E, counts_N[filled], values_K, probs_K)
    else:
        logprobs_E = np.empty(len(codes_E), np.float32)
        at, sums_N = np.empty(len(counts_N), np.int64), np.empty(len(counts_N), np.float64)
        values_of_top_k(counts_N, codes_E, values_K, probs_K, logprobs_E, at, sums_N)
        if not filled.all():
            at, sums_N = at[filled], sums_N[filled]
    logprobs_E[at] = _largest(probs_K[codes_E[at]], sums_N, tail_N[filled], step)
    return logprobs_E


def _by_numpy(
    codes_E: NDArray[np.uint8],
    counts_N: NDArray[np.int32],
    values_K: NDArray[np.float32],
    probs_K: NDArray[np.float64],
) -> tuple[NDArray[np.float32], _I64, NDArray[np.float64]]:
    """Return log p, the place of each position's largest entry and the sum of its p; none empty."""
    first = _starts(counts_N)
    logprobs_E = values_K[codes_E]
    sums = np.add.reduceat(probs_K[codes_E], first)
    largest = np.maximum.reduceat(logprobs_E, first)
    # Of equal codes the lowest id is taken: the choice does not matter, but must be defined.
    candidates = np.flatnonzero(logprobs_E == np.repeat(largest, counts_N))
    owner = np.repeat(np.arange(counts_N.size), counts_N)[candidates]
    return logprobs_E, candidates[np.unique(owner, return_index=True)[1]], sums


def _largest(
    own_N: NDArray[np.float64],
    sums_N: NDArray[np.float64],
    tail_N: NDArray[np.float32],
    step: float,
) -> NDArray[np.float32]:
    """Return log p of each position's largest entry, as 1 - tail - others."""
    rest_N = 1.0 - tail_N.astype(np.float64) - (sums_N - own_N)
    low_N, high_N = own_N * np.exp(-step), np.minimum(own_N * np.exp(step), 1.0)
    # Only in damaged data are all values so small that their exponentials are 0.
    least = np.finfo(np.float64).tiny
    logs_N: NDArray[np.float64] = np.log(np.maximum(np.clip(rest_N, low_N, high_N), least))
    return logs_N.astype(np.float32)


def _starts(counts_N: NDArray[np.int32]) -> NDArray[np.int64]:
    starts_N = np.zeros(counts_N.size, np.int64)
    np.cumsum(counts_N[:-1], out=starts_N[1:])
    return starts_N
