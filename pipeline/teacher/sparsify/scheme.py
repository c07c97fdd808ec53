"""The capture settings as a scheme: entries that are always kept, and the rule for the rest."""

from __future__ import annotations

from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.quantisation import HELDOUT_QUANTISATION, SAMPLED_QUANTISATION
from pipeline.teacher.settings import CaptureSettings
from pipeline.teacher.sparsify.device import SparseScheme

__all__ = ["OVERSAMPLING", "capture_scheme"]

OVERSAMPLING = 4.0
"""Times as many candidates as kept entries; what it changes is in decisions/sampling.md."""
_TAU_ALONE = 1 / 28
_TAU_BESIDE = (1 / 9, 1 / 23.5)
"""At T = 1 beside another temperature, and at that one: `make bench-fidelity` has the trade-off."""

_HELDOUT_TAU = 1 / 64
"""`make bench-heldout` has the error of the KL that it leaves."""


def capture_scheme(settings: CaptureSettings, *, on_device: bool = True) -> SparseScheme:
    """Return the scheme that the settings describe; `fit_tau.py` fits it to `mean_entries`.

    Args:
        settings: of the capture.
        on_device: whether the engine has whole rows of logits, of which it can sample.
    """
    grid = settings.temperatures
    if settings.scheme == "top_k":
        sampled = settings.heldout == "sampled" or (settings.heldout == "auto" and on_device)
        return SparseScheme(settings.top_k, grid, heldout=_heldout(settings) if sampled else None)
    taus = settings.tau or _default_taus(grid)
    return SparseScheme(
        # The teacher's likeliest token is always kept, however flat the distribution is.
        settings.top_k if settings.scheme == "top_k_sampled" else 1,
        grid,
        InclusionRule(grid, taus),
        SAMPLED_QUANTISATION,
        oversampling=OVERSAMPLING,
        mean_entries=settings.mean_entries,
        taus_before=() if settings.mean_entries is None else taus,
    )


def _heldout(settings: CaptureSettings) -> SparseScheme:
    """Return the top-k with a sampled tail, by which the KL of held-out rows has no bias.

    The tail is what a KL at a high temperature is about, and there are few such rows.
    """
    grid = settings.temperatures
    used = {1.0, max(grid)}
    taus = tuple(_HELDOUT_TAU if value in used else 0.0 for value in grid)
    return SparseScheme(settings.top_k, grid, InclusionRule(grid, taus), HELDOUT_QUANTISATION)


def _default_taus(grid: tuple[float, ...]) -> tuple[float, ...]:
    """One temperature: its own tau. Several: for 1 and the largest, and the rest profits."""
    highest = max(grid)
    if highest == 1.0:
        return tuple(_TAU_ALONE if value == 1.0 else 0.0 for value in grid)
    beside = {1.0: _TAU_BESIDE[0], highest: _TAU_BESIDE[1]}
    return tuple(beside.get(value, 0.0) for value in grid)
