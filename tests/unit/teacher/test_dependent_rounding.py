"""Dependent rounding: integral, every sum kept within one, right on average."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.teacher.sparsify.dependent_rounding import ONE, round_dependently

EDGES, LEFT, RIGHT, TIMES = 300, 20, 60, 400


@pytest.mark.parametrize("right", [1, 3, RIGHT])
def test_sums_stay_and_the_mean_is_the_weight(right: int) -> None:
    generator = np.random.default_rng(5)
    ends_2E = np.stack(
        [generator.integers(0, LEFT, EDGES), LEFT + np.sort(generator.integers(0, right, EDGES))]
    )
    share_E = generator.random(EDGES) * generator.choice([0, 0.3, 1, 1.2], EDGES)
    weight_E = (np.minimum(share_E, 1) * ONE).astype(np.int64)
    total_E = np.zeros(EDGES)
    for _ in range(TIMES):
        rounded_E = weight_E.copy()
        random_E = generator.integers(0, ONE, EDGES)
        round_dependently(rounded_E, ends_2E, LEFT + right, random_E)
        assert set(rounded_E.tolist()) <= {0, ONE}
        for end_E in ends_2E:
            change_X = np.bincount(end_E, (rounded_E - weight_E) / ONE)
            assert np.abs(change_X).max() < 1
        total_E += rounded_E / ONE
    mean_E = weight_E / ONE
    deviation_E = np.sqrt(np.maximum(mean_E * (1 - mean_E), 1e-6) / TIMES)
    z_E = (total_E / TIMES - mean_E) / deviation_E
    assert np.abs(z_E).max() < 4.5
    assert np.square(z_E[(mean_E > 0) & (mean_E < 1)]).mean() < 1.5


def test_nothing_is_done_to_what_is_whole() -> None:
    weight_E = np.array([0, ONE, ONE])
    round_dependently(weight_E, np.array([[0, 0, 0], [1, 1, 1]]), 2, np.zeros(3, np.int64))
    assert weight_E.tolist() == [0, ONE, ONE]
