"""log Z and entropy of the teacher at a temperature: from the grid, or approximated off it.

Shapes: N supervised tokens, K entries of the fullest one, G temperatures of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pipeline.errors import ConfigError

__all__ = ["OffGrid", "interpolated", "self_normalised", "temperature_index"]

OffGrid = Literal["refuse", "interpolated", "self_normalised"]


def temperature_index(grid: Sequence[float], temperature: float) -> int:
    """Return the column of a temperature in the cache's grid.

    Raises:
        ConfigError: it is not there; the message lists the grid.
    """
    for index, known in enumerate(grid):
        if abs(known - temperature) <= 1e-6 * temperature:
            return index
    raise ConfigError(
        f"temperature {temperature:g} is not in the cache",
        expected="one of " + _listed(grid),
        do="choose one of these, or cache the teacher again with that temperature",
    )


def interpolated(
    grid: Sequence[float], temperature: float, log_z_NG: Tensor, entropy_NG: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log Z and entropy between two temperatures of the grid, float32 [N] each.

    In b = 1 / T, log Z is smooth and its slope is known: log Z - b dlogZ/db is the entropy. The
    cubic through both ends with both slopes (Hermite) is off by 0.04 to 0.06 nats at 1.25 and 1.5
    from a grid of 1 and 2 (root mean square over synthetic heavy-tailed rows; the entries alone
    miss log Z by 0.9 to 1.7 there): weights wrong by so many hundredths, a bias.

    Raises:
        ConfigError: the temperature is outside the grid.
    """
    below = [t for t in grid if t < temperature]
    above = [t for t in grid if t > temperature]
    if not below or not above:
        raise ConfigError(
            f"temperature {temperature:g} is outside the cache's grid, {_listed(grid)}",
            expected="one between two of them",
            do="choose such a one, or loss.off_grid self_normalised",
        )
    warm, cold = min(above), max(below)
    b, b0, b1 = 1 / temperature, 1 / warm, 1 / cold
    f0_N, f1_N = (log_z_NG[:, grid.index(t)].double() for t in (warm, cold))
    h0_N, h1_N = (entropy_NG[:, grid.index(t)].double() for t in (warm, cold))
    width, s = b1 - b0, (b - b0) / (b1 - b0)
    d0_N, d1_N = (f0_N - h0_N) / b0 * width, (f1_N - h1_N) / b1 * width
    rise_N = f1_N - f0_N
    a2_N, a3_N = 3 * rise_N - 2 * d0_N - d1_N, d0_N + d1_N - 2 * rise_N
    log_z_N = f0_N + s * (d0_N + s * (a2_N + s * a3_N))
    slope_N = (d0_N + s * (2 * a2_N + 3 * s * a3_N)) / width
    return log_z_N.float(), (log_z_N - b * slope_N).float()


def self_normalised(
    logprobs_NK: Tensor, inclusion_NK: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return log Z and entropy at T as if the entries, each as often as it stands for, were all.

    Biased: of top-k entries by the mass that they lack at T, of sampled ones as any ratio of
    estimates is. A position without entries gets 0 and 0.
    """
    scaled_NK = logprobs_NK.double() / temperature
    log_w_NK = scaled_NK
    if inclusion_NK is not None:
        log_w_NK = scaled_NK - inclusion_NK.double().log()
    log_z_N = log_w_NK.logsumexp(-1)
    log_z_N = torch.where(torch.isfinite(log_z_N), log_z_N, 0.0)
    weight_NK = (log_w_NK - log_z_N[:, None]).exp()
    log_p_NK = torch.where(weight_NK > 0, scaled_NK - log_z_N[:, None], 0.0)
    return log_z_N.float(), -(weight_NK * log_p_NK).sum(-1).float()


def _listed(grid: Sequence[float]) -> str:
    return ", ".join(f"{known:g}" for known in grid)
