"""Permutations that never change: hashes of indices, sorted.

NumPy promises no stable stream for `Generator.permutation`; 64-bit integer arithmetic and a
stable sort need no promise. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", 2014).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["derive_key", "permutation"]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def derive_key(*parts: int) -> int:
    """Mix integers (any size and sign) into one 64-bit key; the order of parts matters."""
    state = 0
    for part in parts:
        state = _mix((state + _GAMMA + (part & _MASK)) & _MASK)
    return state


def permutation(count: int, key: int) -> NDArray[np.int64]:
    """Return a permutation of `range(count)` that depends on the key alone."""
    with np.errstate(over="ignore"):  # wrapping around is the point
        x = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA)) + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
        x = x ^ (x >> np.uint64(31))
    return np.argsort(x, kind="stable").astype(np.int64)


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)
