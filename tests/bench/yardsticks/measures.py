"""Arithmetic of the yardsticks: angles, shares of a gap, calibration, and their standard errors.

Shapes: S seeds, R rows (held-out sequences), N tokens, B bins of confidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BINS", "Estimate", "angle", "bins_of", "calibration_error", "estimate", "gap_closed",
    "mean_and_error",
]  # fmt: skip

BINS = 15
"""Of equal width in confidence: what most papers on calibration use."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its standard errors."""

    value: float
    by_rows: float
    by_seeds: float

    def __str__(self) -> str:
        return f"{self.value:.4f} +- {self.by_rows:.4f} (rows) {self.by_seeds:.4f} (seeds)"


def angle(dot: float, norm: float, other: float) -> float:
    """Return the angle in degrees between vectors of a dot product and two norms above 0."""
    return math.degrees(math.acos(min(1.0, max(-1.0, dot / (norm * other)))))


def gap_closed(worst: float, found: float, best: float) -> float:
    """Return the share of the way from `worst` to `best`: 0 at the first, 1 at the second."""
    return (worst - found) / (worst - best)


def bins_of(confidence_N: Array, correct_N: NDArray[np.bool_], bins: int = BINS) -> Array:
    """Return [B, 3]: tokens of each bin, and sums of their confidence and of the correct ones."""
    bin_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    weights = (None, confidence_N, correct_N.astype(np.float64))
    return np.stack([np.bincount(bin_N, weight, bins) for weight in weights], 1).astype(np.float64)


def calibration_error(bins_RB3: Array) -> float:
    """Return the expected calibration error (ECE), a share: mean |confidence - accuracy|."""
    bins_B3 = bins_RB3.reshape(-1, *bins_RB3.shape[-2:]).sum(0)
    return float(np.abs(bins_B3[:, 1] - bins_B3[:, 2]).sum() / bins_B3[:, 0].sum())


def estimate(statistic: Callable[..., float], *tables_SR: Array) -> Estimate:
    """Return a statistic's mean over seeds, with errors by rows and by seeds.

    Args:
        statistic: of one seed's rows of every table; need not be a mean (the share of a gap, ECE).
        tables_SR: one value or array of each seed and row; the same rows in all.

    Returns:
        The error by rows is the jackknife's; that by seeds is NaN where there is one seed.
    """
    seeds, rows = tables_SR[0].shape[:2]

    def of_seeds(kept: NDArray[np.bool_]) -> Array:
        found = [statistic(*(table[seed][kept] for table in tables_SR)) for seed in range(seeds)]
        return np.array(found)

    whole_S = of_seeds(np.ones(rows, bool))
    without_R = np.array([of_seeds(np.arange(rows) != row).mean() for row in range(rows)])
    by_rows = math.sqrt((rows - 1) * without_R.var())
    by_seeds = whole_S.std(ddof=1) / math.sqrt(seeds) if seeds > 1 else math.nan
    return Estimate(float(whole_S.mean()), by_rows, float(by_seeds))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error (NaN of a single value)."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)
