"""Loops over entries, compiled by numba: runs of ranks to class symbols and bits, and back.

A run is the ascending ranks of one kind of entries at one position. A gap g >= 0 to the rank before
(the first one's is the rank itself) is the class c = floor(log2(g + 1)), a symbol, and c bits,
g + 1 - 2^c, lowest first, in a stream that is padded to a whole byte at the end of each row.

Numba checks no bounds: callers make sure that lengths agree, and the readers test every bit
position and rank before they use it.

Legend: S rows, N positions, E entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["PADDING", "place", "places", "read_runs", "sort_runs", "write_runs"]

Ints = NDArray[np.integer[Any]]
Bytes = NDArray[np.uint8]
Reals = NDArray[np.float32]

PADDING = 8
"""Bytes that must follow the bits handed to `read_runs`."""


@njit(cache=True, nogil=True)
def write_runs(
    ranks_E: Ints, counts_N: Ints, positions_S: Ints, classes_E: Bytes, bits: Bytes, ends_S: Ints
) -> int:
    """Write classes and bits of all rows; `ends_S` gets each row's end in bytes.

    Returns:
        -1, or the entry whose rank does not ascend.
    """
    entry = 0
    position = 0
    byte = 0
    for row in range(len(positions_S)):
        window = np.uint64(0)
        filled = 0
        for _ in range(positions_S[row]):
            previous = -1
            for _ in range(counts_N[position]):
                gap = ranks_E[entry] - previous
                if gap <= 0:
                    return entry
                previous = ranks_E[entry]
                c = 0
                while gap >> (c + 1):
                    c += 1
                classes_E[entry] = c
                window |= np.uint64(gap - (1 << c)) << np.uint64(filled)
                filled += c
                while filled >= 8:
                    bits[byte] = np.uint8(window & np.uint64(255))
                    window >>= np.uint64(8)
                    filled -= 8
                    byte += 1
                entry += 1
            position += 1
        if filled:
            bits[byte] = np.uint8(window & np.uint64(255))
            byte += 1
        ends_S[row] = byte
    return -1


@njit(cache=True, nogil=True)
def read_runs(
    classes_E: Bytes,
    bits: Bytes,
    starts_S: Ints,
    counts_N: Ints,
    positions_S: Ints,
    vocab_size: int,
    ranks_E: Ints,
) -> int:
    """Read the ranks of all rows.

    `bits` holds `PADDING` bytes after the last row's; `starts_S` has one more element than rows.

    Returns:
        -1, or the row that is damaged.
    """
    entry = 0
    position = 0
    for row in range(len(positions_S)):
        at = starts_S[row] * 8
        end = starts_S[row + 1] * 8
        for _ in range(positions_S[row]):
            previous = -1
            for _ in range(counts_N[position]):
                c = np.int64(classes_E[entry])
                if c > 24 or at + c > end:
                    return row
                byte = at >> 3
                window = (
                    np.int64(bits[byte])
                    | np.int64(bits[byte + 1]) << 8
                    | np.int64(bits[byte + 2]) << 16
                    | np.int64(bits[byte + 3]) << 24
                )
                low = (window >> (at & 7)) & ((1 << c) - 1)
                previous += (1 << c) + low
                if previous >= vocab_size:
                    return row
                ranks_E[entry] = previous
                at += c
                entry += 1
            position += 1
        if end - at >= 8:
            return row
    return -1


@njit(cache=True, nogil=True)
def sort_runs(ranks_E: Ints, levels_E: Bytes, counts_N: Ints) -> None:
    """Sort each run by rank, values along with it, in place."""
    begin = 0
    for count in counts_N:
        end = begin + count
        if count > 96:  # insertion takes count^2 / 4 steps
            order = np.argsort(ranks_E[begin:end])
            ranks_E[begin:end] = ranks_E[begin:end][order]
            levels_E[begin:end] = levels_E[begin:end][order]
        else:
            for at in range(begin + 1, end):
                rank, level = ranks_E[at], levels_E[at]
                to = at
                while to > begin and ranks_E[to - 1] > rank:
                    ranks_E[to] = ranks_E[to - 1]
                    levels_E[to] = levels_E[to - 1]
                    to -= 1
                ranks_E[to] = rank
                levels_E[to] = level
        begin = end


@njit(cache=True, nogil=True)
def place(
    first_N: Ints, counts_N: Ints, ids_e: Ints, logprobs_e: Reals, ids_E: Ints, logprobs_E: Reals
) -> None:
    """Copy the entries of one kind to where each position's run of that kind begins."""
    entry = 0
    for position in range(len(counts_N)):
        to = first_N[position]
        for _ in range(counts_N[position]):
            ids_E[to] = ids_e[entry]
            logprobs_E[to] = logprobs_e[entry]
            to += 1
            entry += 1


@njit(cache=True, nogil=True)
def places(first_N: Ints, counts_N: Ints) -> Ints:
    """Return where the entries of each position's run of one kind stand."""
    where_e = np.empty(counts_N.sum(), np.int64)
    entry = 0
    for position in range(len(counts_N)):
        for step in range(counts_N[position]):
            where_e[entry] = first_N[position] + step
            entry += 1
    return where_e
