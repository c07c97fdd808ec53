"""Loops over entries, compiled by numba: runs of ranks to symbols and bits and back.

A run is the ascending ranks of one kind of entries at one position. The gap g >= 0 to the rank
before (for the first: the rank itself) is written as the class c = floor(log2(g + 1)), a symbol,
and c bits, g + 1 - 2^c, lowest first, in a stream that is padded to a byte at the end of each
row.

The stream of a symbol depends on what is known before it is read (`_stream`). Each stream is a
Parquet column, so zstd's entropy coder models each separately.

Numba does not check bounds: callers make sure that lengths agree, and the readers check every
index, bit position and rank before use. Numba does check signed indices for being negative, so the
loops over entries use unsigned ones (this saved 3 ms of 37 on a shard of 65,536 tokens).

Legend: S rows, N positions, E entries, C streams, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.jit import kernel

__all__ = [
    "PADDING",
    "READ_FAULTS",
    "read_runs",
    "sort_runs",
    "write_runs",
]

Ints = NDArray[np.integer[Any]]
Bytes = NDArray[np.uint8]

PADDING = 8
"""Bytes that must follow the bits passed to `read_runs`."""
_FAR = 62
"""Ranks below this are `near`, where gaps are short."""
_RARE = 1023
"""From this rank on sampled entries have small probabilities."""
_ESCAPE = 15
"""Two sampled codes share a byte. A code has about 2 bits of entropy, and in a byte of its own
zstd's match search costs more than it saves (3.5 bytes a token against 2.65). Codes from this one
on are escaped to another stream."""

_FEW, _COUNT_SORT = 4, 128
"""Runs longer than the first and up to the second are sorted by counting smaller keys, count^2 / 8
vector compares: 3 ns an entry at 23 entries a run, where an insertion sort takes 11 because of
mispredicted branches. Shorter runs are sorted by insertion."""

READ_FAULTS = ("", "a symbol is missing", "a gap is too long", "bits are missing",
               "a rank is outside the vocabulary", "bits are left over", "symbols are left over",
               "a value is missing", "values are left over")  # fmt: skip
"""Descriptions of the first result of `read_runs`."""


@kernel
def _stream(before: int | np.int64, left: int) -> int:
    """Return the symbol's stream: near or far from rank 0, and whether the run ends with it."""
    return 2 * int(before >= _FAR) + int(left == 1)


@kernel
def _room(counts_N: Ints) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return two buffers for the longest run and the padding that `_sort` appends."""
    most = 0
    for count in counts_N:
        most = max(most, count)
    return np.empty(most + 8, np.int32), np.empty(most + 8, np.int32)


@kernel
def _sort(
    run: NDArray[np.int32],
    smaller: NDArray[np.int32],
    count: int,
    keys_E: Ints,
    codes_E: Bytes,
    begin: int,
) -> None:
    """Write a run's keys and codes from `begin` on, by ascending key.

    Args:
        run: key << 8 | code, so that they move as one number (26 bits). Of two equal
            keys the second place is not written.
        smaller: buffer for the number of smaller keys, for each of the run.
        count: entries of the run; `run` and `smaller` have room for 7 more.
        keys_E: out.
        codes_E: out.
        begin: first place.
    """
    if count <= _FEW:
        for at in range(count):
            key = run[at]
            to = begin + at
            while to > begin and keys_E[to - 1] > key >> 8:
                keys_E[to], codes_E[to] = keys_E[to - 1], codes_E[to - 1]
                to -= 1
            keys_E[to] = key >> 8
            codes_E[to] = key & 255
        return
    if count > _COUNT_SORT:
        run[:count].sort()
        for at in range(count):
            smaller[at] = at
    else:
        whole = (count + 7) & ~7  # vectors of 8: no remainder loop
        for at in range(count, whole):
            run[at] = 0x7FFFFFFF
        for at in range(0, whole, 4):  # four at once: one load for four compares
            first, second, third, fourth = run[at], run[at + 1], run[at + 2], run[at + 3]
            below = below_second = below_third = below_fourth = np.int32(0)
            for other in range(whole):
                key = run[other]
                below += np.int32(key < first)
                below_second += np.int32(key < second)
                below_third += np.int32(key < third)
                below_fourth += np.int32(key < fourth)
            smaller[at], smaller[at + 1] = below, below_second
            smaller[at + 2], smaller[at + 3] = below_third, below_fourth
    for at in range(count):
        sorted_to = np.uint64(begin) + np.uint64(smaller[at])
        keys_E[sorted_to] = run[at] >> 8
        codes_E[sorted_to] = run[at] & 255


@kernel
def sort_runs(keys_E: Ints, codes_E: Bytes, counts_N: Ints) -> None:
    """Sort each run by key, with its values, in place.

    A duplicate key leaves two equal keys or a -1, which `write_runs` reports as not ascending.
    """
    run, smaller = _room(counts_N)
    begin = 0
    for count in counts_N:
        for place in range(count):
            at = np.uint64(begin + place)
            run[place] = np.int32(keys_E[at]) << 8 | np.int32(codes_E[at])
            keys_E[at] = -1
        _sort(run, smaller, count, keys_E, codes_E, begin)
        begin += count


@kernel
def write_runs(
    ranks_E: Ints,
    codes_E: Bytes,
    counts_N: Ints,
    positions_S: Ints,
    symbols_CE: Bytes,
    symbol_ends_CS: Ints,
    bits: Bytes,
    bit_ends_S: Ints,
    values_DE: Bytes,
    value_ends_DS: Ints,
) -> int:
    """Write symbols, bits and values of all rows, and where each row ends in each stream.

    Streams of values: one of bytes, or three: half bytes of ranks below and from `_RARE`, and the
    codes that do not fit a half byte. All outputs have room for every entry; those of half bytes
    are zero at first.

    Returns:
        -1, or the entry whose rank does not ascend.
    """
    streams, value_streams = symbols_CE.shape[0], values_DE.shape[0]
    at_C = np.zeros(streams, np.int64)
    value_at_D = np.zeros(value_streams, np.int64)
    entry = 0
    position = 0
    byte = 0
    for row in range(len(positions_S)):
        window = np.uint64(0)
        filled = 0
        for _ in range(positions_S[row]):
            before = -1
            left = counts_N[position]
            for _ in range(counts_N[position]):
                rank = ranks_E[np.uint64(entry)]
                gap = rank - before
                if gap <= 0:
                    return entry
                c = 0
                while gap >> (c + 1):
                    c += 1
                stream = _stream(before, left)
                symbols_CE[stream, np.uint64(at_C[stream])] = c
                at_C[stream] += 1
                code = codes_E[np.uint64(entry)]
                if value_streams == 1:
                    values_DE[0, np.uint64(value_at_D[0])] = code
                    value_at_D[0] += 1
                else:
                    stream = int(rank >= _RARE)
                    half = value_at_D[stream]
                    value_at_D[stream] += 1
                    at = np.uint64(half >> 1)
                    values_DE[stream, at] |= min(code, _ESCAPE) << (4 * (half & 1))
                    if code >= _ESCAPE:
                        values_DE[2, value_at_D[2]] = code
                        value_at_D[2] += 1
                window |= np.uint64(gap - (1 << c)) << np.uint64(filled)
                filled += c
                while filled >= 8:
                    bits[np.uint64(byte)] = np.uint8(window & np.uint64(255))
                    window >>= np.uint64(8)
                    filled -= 8
                    byte += 1
                before = rank
                left -= 1
                entry += 1
            position += 1
        if filled:
            bits[byte] = np.uint8(window & np.uint64(255))
            byte += 1
        bit_ends_S[row] = byte
        for stream in range(streams):
            symbol_ends_CS[stream, row] = at_C[stream]
        if value_streams > 1:  # a row ends at a byte boundary
            value_at_D[0] += value_at_D[0] & 1
            value_at_D[1] += value_at_D[1] & 1
            value_ends_DS[0, row] = value_at_D[0] >> 1
            value_ends_DS[1, row] = value_at_D[1] >> 1
            value_ends_DS[2, row] = value_at_D[2]
        else:
            value_ends_DS[0, row] = value_at_D[0]
    return -1


@kernel
def read_runs(
    symbols: Bytes,
    symbol_starts_CS: Ints,
    bits: Bytes,
    bit_starts_S: Ints,
    values: Bytes,
    value_starts_DS: Ints,
    counts_N: Ints,
    positions_S: Ints,
    order_V: Ints,
    ids_E: Ints,
    codes_E: Bytes,
) -> tuple[int, int]:
    """Read ids and codes of all rows, by ascending id within a position.

    A row decodes the same whatever the order of its shard's ranks.

    Args:
        symbols: all streams end to end.
        symbol_starts_CS: [C, S + 1], where each row begins in `symbols`.
        bits: with `PADDING` bytes after the last row's.
        bit_starts_S: S + 1 offsets.
        values: all value streams end to end.
        value_starts_DS: as for symbols.
        counts_N: entries of each position, at least 0; their sum is the length of the outputs.
        positions_S: of each row.
        order_V: the token of each rank.
        ids_E: out.
        codes_E: out.

    Returns:
        0 and -1, or the place in `READ_FAULTS` and the row that is damaged.
    """
    value_streams = value_starts_DS.shape[0]
    at_C = np.zeros(symbol_starts_CS.shape[0], np.int64)
    value_at_D = np.zeros(value_streams, np.int64)
    vocab = len(order_V)
    run, smaller = _room(counts_N)
    entry = 0
    position = 0
    for row in range(len(positions_S)):
        bit = bit_starts_S[row] * 8
        bit_end = bit_starts_S[row + 1] * 8
        at_C[:] = symbol_starts_CS[:, row]
        value_at_D[:] = value_starts_DS[:, row]
        if value_streams > 1:
            value_at_D[:2] *= 2
        for _ in range(positions_S[row]):
            count = counts_N[position]
            position += 1
            if not count:
                continue
            before = np.int64(-1)
            place = 0
            while place < count:
                # One stream after the other: within a stream no read waits for the rank.
                last = place == count - 1
                stream = _stream(before, count - place)
                until = vocab if before >= _FAR else _FAR
                stop = count if last else count - 1
                at = at_C[stream]
                at_end = symbol_starts_CS[stream, row + 1]
                while place < stop and before < until:
                    if at >= at_end:
                        return 1, row
                    c = np.int64(symbols[np.uint64(at)])
                    at += 1
                    if c > 18:
                        return 2, row
                    if bit + c > bit_end:
                        return 3, row
                    byte = np.uint64(bit >> 3)
                    window = (
                        np.int64(bits[byte])
                        | np.int64(bits[byte + np.uint64(1)]) << 8
                        | np.int64(bits[byte + np.uint64(2)]) << 16
                        | np.int64(bits[byte + np.uint64(3)]) << 24
                    )
                    before += (1 << c) + ((window >> (bit & 7)) & ((1 << c) - 1))
                    if before >= vocab:
                        return 4, row
                    bit += c
                    run[np.uint64(place)] = before
                    place += 1
                at_C[stream] = at
            if value_streams == 1:
                at = value_at_D[0]
                if at + count > value_starts_DS[0, row + 1]:
                    return 7, row
                for place in range(count):
                    token = order_V[np.uint64(run[place])]
                    run[place] = token << 8 | np.int32(values[np.uint64(at + place)])
                value_at_D[0] = at + count
            else:
                common = 0
                for place in range(count):
                    common += int(run[place] < _RARE)
                for stream in range(2):
                    first = common * stream
                    some = count - common if stream else common
                    half = value_at_D[stream]
                    value_at_D[stream] += some
                    if value_at_D[stream] + 1 >> 1 > value_starts_DS[stream, row + 1]:
                        return 7, row
                    for place in range(some):
                        nibble = np.uint64(half + place)
                        code = np.int32(values[nibble >> np.uint64(1)])
                        code = code >> 4 * np.int32(nibble & np.uint64(1)) & 15
                        if code == _ESCAPE:
                            if value_at_D[2] >= value_starts_DS[2, row + 1]:
                                return 7, row
                            code = np.int32(values[value_at_D[2]])
                            value_at_D[2] += 1
                        to = np.uint64(first + place)
                        run[to] = order_V[np.uint64(run[to])] << 8 | code
            _sort(run, smaller, count, ids_E, codes_E, entry)
            entry += count
        if bit_end - bit >= 8:
            return 5, row
        for stream in range(len(at_C)):
            if at_C[stream] != symbol_starts_CS[stream, row + 1]:
                return 6, row
        if value_streams > 1:
            value_at_D[:2] = value_at_D[:2] + 1 >> 1
        for stream in range(value_streams):
            if value_at_D[stream] != value_starts_DS[stream, row + 1]:
                return 8, row
    return 0, -1
