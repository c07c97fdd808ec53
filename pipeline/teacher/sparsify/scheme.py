"""The capture settings as a scheme: entries that are always kept, and the rule for the rest."""

from __future__ import annotations

from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.quantisation import SAMPLED_QUANTISATION
from pipeline.teacher.settings import CaptureSettings
from pipeline.teacher.sparsify.device import SparseScheme

__all__ = ["OVERSAMPLING", "capture_scheme"]

OVERSAMPLING = 4.0
"""Times as many candidates as kept entries; what it changes is in decisions/sampling.md."""
_TAU_ALONE = 1 / 28
_TAU_BESIDE = (1 / 9, 1 / 23.5)
"""At T = 1 beside another temperature, and at that one: `make bench-fidelity` has the trade-off."""


def capture_scheme(settings: CaptureSettings) -> SparseScheme:
    """Return the scheme that the settings describe; `fit_tau.py` fits it to `mean_entries`."""
    grid = settings.temperatures
    if settings.scheme == "top_k":
        return SparseScheme(settings.top_k, grid)
    taus = settings.tau or _default_taus(grid)
    return SparseScheme(
        settings.top_k if settings.scheme == "top_k_sampled" else 0,
        grid,
        InclusionRule(grid, taus),
        SAMPLED_QUANTISATION,
        oversampling=OVERSAMPLING,
        mean_entries=settings.mean_entries,
        taus_before=() if settings.mean_entries is None else taus,
    )


def _default_taus(grid: tuple[float, ...]) -> tuple[float, ...]:
    """One temperature: its own tau. Several: for 1 and the largest, and the rest profits."""
    highest = max(grid)
    if highest == 1.0:
        return tuple(_TAU_ALONE if value == 1.0 else 0.0 for value in grid)
    beside = {1.0: _TAU_BESIDE[0], highest: _TAU_BESIDE[1]}
    return tuple(beside.get(value, 0.0) for value in grid)
