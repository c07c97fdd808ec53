"""Columns of engines that tell log-probs alone: the entropy is a bound, and is never zero."""

from __future__ import annotations

import numpy as np

from pipeline.teacher.engines.top_k_columns import top_k_columns


def test_the_entropy_is_that_of_the_entries_and_one_token_for_the_rest() -> None:
    p_K = np.array([0.5, 0.2])
    columns_NC = top_k_columns(
        np.log(np.array([0.2], np.float32)),
        np.array([[1, 2]], np.int32),
        np.log(p_K)[None].astype(np.float32),
    )
    whole = np.array([0.5, 0.2, 0.3])
    wanted = [np.log(0.2), 0.3, 0.0, -(whole * np.log(whole)).sum(), 1, 2, *np.log(p_K)]
    np.testing.assert_allclose(columns_NC, [wanted], rtol=1e-6)


def test_a_token_without_probability_adds_nothing() -> None:
    log_p_NK = np.array([[0.0, -np.inf]], np.float32)
    columns_NC = top_k_columns(log_p_NK[:, 0], np.array([[3, 4]], np.int32), log_p_NK)
    assert columns_NC[0, :4].tolist() == [0.0, 0.0, 0.0, 0.0]


def test_entries_that_hold_everything_leave_no_tail() -> None:
    log_p_NK = np.log(np.array([[0.75, 0.25]], np.float32))
    columns_NC = top_k_columns(log_p_NK[:, 0], np.array([[3, 4]], np.int32), log_p_NK)
    np.testing.assert_allclose(columns_NC[0, 1:4], [0.0, 0.0, 0.5623351], atol=1e-6)
