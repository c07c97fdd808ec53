"""How far a student has moved from the model that wrote a text, by the written tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CacheError
from pipeline.evaluate.measures import MeanError, ratio_mean

__all__ = ["written_drift"]

_Reals = NDArray[np.floating[Any]]


def written_drift(written_RN: Sequence[_Reals], now_RN: Sequence[_Reals]) -> MeanError:
    """Return the token mean of log q_written - log q_now, and its standard error by rows.

    Where the tokens were drawn at temperature 1 with no filter (top-k, top-p, min-p), this is an
    unbiased estimate of KL(q_written || q_now) a token, over the contexts that q_written reaches: 0
    for the writer itself, and above 0 on average for any other. Drawn otherwise, it is a difference
    of two log-likelihoods of that text, which can be below 0, and no divergence.

    Args:
        written_RN: of each row the writer's log-probs of its written tokens, at temperature 1.
        now_RN: the present student's, of the same tokens.

    Returns:
        In nats a token; NaN without a token, the error NaN with fewer than two rows: tokens of
        a row hang together, so rows are the observations.

    Raises:
        CacheError: rows that differ in length.
    """
    if [len(row) for row in written_RN] != [len(row) for row in now_RN]:
        raise CacheError(
            "log-probs of the writer and of the student for different tokens",
            expected="the same rows and supervised tokens",
        )
    sums = [
        float(np.sum(np.asarray(written_N, np.float64) - np.asarray(now_N, np.float64)))
        for written_N, now_N in zip(written_RN, now_RN, strict=True)
    ]
    return ratio_mean(sums, [len(row) for row in written_RN])
