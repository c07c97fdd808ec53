"""Runs of every length are sorted the same, and a run with a duplicate key is reported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.codec.kernels import sort_runs, write_runs

LENGTHS = (0, 1, 2, 4, 5, 8, 9, 31, 128, 129, 300)
"""Both sides of the limits between sorting algorithms, and of full vectors."""


@settings(deadline=None)  # the first call compiles
@given(st.permutations(LENGTHS), st.integers(0, 2**32 - 1))
def test_runs_are_sorted_with_their_values(lengths: list[int], seed: int) -> None:
    """Each by itself, keys up to the largest vocabulary's, codes up to the largest byte."""
    generator = np.random.default_rng(seed)
    runs = [np.cumsum(generator.integers(1, 2**18 // 300, count)) for count in lengths]
    keys_E = np.concatenate([generator.permutation(run) for run in runs]).astype(np.int32)
    codes_E = generator.integers(0, 256, len(keys_E)).astype(np.uint8)
    run_E = np.repeat(np.arange(len(lengths)), lengths)
    order_E = np.lexsort((keys_E, run_E))
    expected = keys_E[order_E].tolist(), codes_E[order_E].tolist()
    sort_runs(keys_E, codes_E, np.array(lengths, np.int64))
    assert (keys_E.tolist(), codes_E.tolist()) == expected


@pytest.mark.parametrize("length", [n for n in LENGTHS if n > 1])
@pytest.mark.parametrize("same_code", [True, False])
def test_a_key_that_stands_twice_is_found(length: int, *, same_code: bool) -> None:
    """For every algorithm: otherwise a different row would be written."""
    keys_E = np.arange(length, dtype=np.int32)[::-1].copy()
    keys_E[0] = keys_E[length // 2]
    codes_E = np.zeros(length, np.uint8)
    codes_E[0] = 0 if same_code else 9
    counts_N = np.array([length], np.int64)
    sort_runs(keys_E, codes_E, counts_N)
    found = write_runs(
        keys_E, codes_E, counts_N, np.array([1], np.int64),
        np.zeros((4, length), np.uint8), np.zeros((4, 1), np.int64),
        np.zeros(3 * length + 1, np.uint8), np.zeros(1, np.int64),
        np.zeros((1, length), np.uint8), np.zeros((1, 1), np.int64),
    )  # fmt: skip
    assert found >= 0


def test_kernels_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba cannot decorate there; the kernels are then compiled in the process."""
    import numba

    from pipeline.cache.codec.jit import kernel

    real = numba.njit

    def njit(*, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(numba, "njit", njit)

    def double(values: np.ndarray) -> int:
        return 2 * len(values)

    assert kernel(double)(np.zeros(3)) == 6
