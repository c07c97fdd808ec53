"""Counter-based random numbers: a hash of (sample, position, ...), reproducible everywhere.

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", 2014). There is no state, so a row can be sampled again alone, by any worker, in
any order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["dither", "mix", "offset", "row_noise", "sample_key"]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def sample_key(sample_id: str) -> int:
    """Return the 64-bit key of a sample: the first 16 of its 32 hexadecimal digits."""
    return int(sample_id[:16], 16)


def row_noise(key: int | NDArray[np.uint64], rows_N: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return 54 random bits for each row (position) of a sample, for sampling and for dither.

    Args:
        key: of the sample, or of each row's sample.
        rows_N: the rows.
    """
    return (mix(key, rows_N) >> np.uint64(10)).astype(np.int64)


def offset(noise_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the upper 30 bits: the offset of a row's systematic sampling, in [0, 2^30)."""
    return noise_N >> 24


def dither(noise_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the lower 24 bits as a number in [-1/2, 1/2), exact in float32."""
    return ((noise_N & 0xFFFFFF) * 2.0**-24 - 0.5).astype(np.float32)


def mix(
    key: int | NDArray[np.uint64], counter: NDArray[np.integer] | NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Return a 64-bit hash for each counter: uniform, and independent for practical purposes.

    Args:
        key: of the stream; a number or one for each counter.
        counter: any integers.
    """
    with np.errstate(over="ignore"):  # wrapping around is intended
        x = np.asarray(counter).astype(np.uint64) + np.uint64(1)
        x = x * _GAMMA + np.asarray(key, np.uint64)
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
        result: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return result
