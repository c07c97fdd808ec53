"""The loops that reduce logits on a CPU: sums, exponentials, the largest entries, the draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sampling.inclusion import InclusionRule
from pipeline.teacher.sparsify.cpu.kernels import (
    draw,
    group_maxima,
    largest_entries,
    steps_of_codes,
    sums_at,
    sums_at_both,
)
from pipeline.teacher.sparsify.device import SparseScheme, sparsify


def _largest(z_V: np.ndarray, k: int, groups: int) -> np.ndarray:
    maxima_M, ids_K = np.empty(groups, np.float32), np.empty(k, np.int64)
    assert group_maxima(z_V, maxima_M) == z_V.max()
    largest_entries(z_V, maxima_M, ids_K)
    return ids_K


@given(
    vocab=st.sampled_from([1, 2, 50, 700, 4096, 9973]),
    share=st.floats(0, 1),
    width=st.sampled_from([1, 3, 16, 64]),
    levels=st.sampled_from([0, 4000, 300, 3, 1]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_the_largest_whatever_is_equal(
    vocab: int, share: float, width: int, levels: int, seed: int
) -> None:
    """From the largest on, of equal ones by id; also more of them than there are groups."""
    random = np.random.default_rng(seed)
    z_V = (random.standard_normal(vocab) * 4).astype(np.float32)
    if levels:  # many equal logits, as of a 16-bit head
        z_V = (random.integers(-levels // 2, levels, vocab) * np.float32(0.5)).astype(np.float32)
        z_V[z_V == 0] *= random.choice([-1, 1])  # -0.0 is equal to 0.0
    k = max(1, min(vocab, round(share * min(vocab, 200))))
    found_K = _largest(z_V, k, max(1, vocab // width))
    assert found_K.tolist() == np.argsort(-(z_V + 0), kind="stable")[:k].tolist()


def test_the_largest_may_stand_together_or_behind_the_groups() -> None:
    for start in (0, 5000, 9900):
        z_V = np.arange(9973, dtype=np.float32) / 1e6
        z_V[start : start + 40] += 5
        assert _largest(z_V, 40, 9973 // 64).tolist() == list(range(start + 39, start - 1, -1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("sharpness", [0.01, 3.0, 40.0, 1000.0])
def test_sums_of_exponentials(temperature: float, sharpness: float) -> None:
    z_V = (np.random.default_rng(1).standard_normal(9973) * sharpness).astype(np.float32)
    z_V[:3] = -3e38, z_V.max(), -1e30  # heads mask by the lowest number; a product must not count
    largest = np.float32(z_V.max())
    x_V = z_V.astype(np.float64) - largest
    for divisor in (temperature, 1.0):
        e_V = np.exp(x_V / divisor)
        there = e_V.sum(), (e_V * x_V).sum()
        found = sums_at(z_V, largest, np.float32(1 / divisor))
        np.testing.assert_allclose(found, there, rtol=3e-7, atol=1e-30)
    both = sums_at_both(z_V, largest)
    np.testing.assert_allclose(both[:2], there, rtol=3e-7, atol=1e-30)
    half_V = np.exp(x_V / 2)
    np.testing.assert_allclose(both[2:], (half_V.sum(), (half_V * x_V).sum()), rtol=3e-7, atol=1e-9)


def test_each_exponential_is_close() -> None:
    """In its whole range, one at a time; below it is nothing."""
    for x in np.concatenate([np.linspace(-86.9, 0, 1531), [-1e-7, -88.0, -1e4]]).astype(np.float32):
        found, _ = sums_at(np.array([x], np.float32), np.float32(0), np.float32(1))
        assert found == pytest.approx(np.exp(np.float64(x)) if x > -87 else 0, rel=3e-7, abs=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 517, 699])
def test_sums_are_not_finite_where_a_logit_is_not(bad: float, at: int) -> None:
    z_V = np.random.default_rng(2).standard_normal(700).astype(np.float32)
    z_V[at] = bad
    largest = np.float32(group_maxima(z_V, np.empty(10, np.float32)))
    assert not np.isfinite(sums_at(z_V, largest, np.float32(0.1))).all()
    assert not np.isfinite(sums_at_both(z_V, largest)[:2]).all()


@pytest.mark.parametrize("step", [2.0, 0.3])
def test_the_draw_is_what_numpy_draws(step: float) -> None:
    """Steps from the rule that readers have, on the value that readers have; a running sum."""
    random = np.random.default_rng(3)
    grid, taus = (0.5, 1.0, 2.0), (0.0, 1 / 9, 1 / 20)
    rule, bits = InclusionRule(grid, taus), 22
    most, log_z_G = float(np.floor((1 << bits) * 0.999)), np.array([-0.4, 0.0, 1.25])
    for _ in range(20):
        z_V = (random.standard_normal(1501) * 3 - 9).astype(np.float32)
        dither, kept_K = np.float32(random.uniform(-0.5, 0.5)), random.permutation(1501)[:7]
        whole, first = (
            np.float32(np.log(np.exp(z_V.astype(float)).sum())),
            int(random.integers(2**22)),
        )
        steps_Q = np.empty(int(np.ceil(40 / step)) + 2, np.int32)
        steps_of_codes(
            np.array(grid), np.array(taus), log_z_G, dither, np.float32(step), bits, most, steps_Q
        )
        ids_D, values_D = np.empty(200, np.float32), np.empty(200, np.float32)
        draw(
            z_V, whole, dither, np.float32(step), steps_Q, kept_K, first, 1 << bits,
            np.empty(1501, np.int32), ids_D, values_D,
        )  # fmt: skip
        code_V = np.clip(
            np.floor((whole - z_V) * (np.float32(1) / np.float32(step)) - dither + np.float32(0.5)),
            0,
            len(steps_Q) - 2,
        )
        value_V = ((-code_V.astype(np.float32) - dither) * np.float32(step)).astype(np.float32)
        pi_V = rule.ratio(value_V, np.tile(log_z_G, (1501, 1)))
        steps_V = np.minimum(pi_V * (1 << bits) + 0.5, most).astype(np.int64)
        steps_V[kept_K] = 0
        sums_V = np.cumsum(steps_V)
        marks = np.arange(first, sums_V[-1], 1 << bits)
        there = np.searchsorted(sums_V, marks, side="right")
        count = len(there)
        assert 5 < count < 200
        assert ids_D[:count].tolist() == there.tolist()
        assert values_D[:count].tolist() == value_V[there].tolist()
        assert (ids_D[count:] == -1).all()
        assert (values_D[count:] == 0).all()


def test_no_more_are_drawn_than_there_are_places() -> None:
    z_V, ids_D, values_D = (
        np.zeros(64, np.float32),
        np.empty(3, np.float32),
        np.empty(3, np.float32),
    )
    steps_Q = np.full(22, 1 << 20, np.int32)
    draw(
        z_V, np.float32(4), np.float32(0), np.float32(2), steps_Q, np.zeros(0, np.int64), 0,
        1 << 21, np.empty(64, np.int32), ids_D, values_D,
    )  # fmt: skip
    assert ids_D.tolist() == [0, 2, 4]


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_that_is_no_token_is_refused(label: int) -> None:
    with pytest.raises(IndexError, match="outside the 5 tokens"):
        sparsify(torch.zeros(2, 5), torch.tensor([0, label]), SparseScheme(2, (1.0,)))
