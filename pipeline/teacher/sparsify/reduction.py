"""The arithmetic of the reduction in torch: statistics, inclusion probabilities, selection.

Legend: R rows (positions), V vocabulary, K always-kept and D sampled places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from pipeline.sampling.inclusion import InclusionRule
from pipeline.teacher.sparsify.sparse_scheme import LOWEST_LOG_P, SparseScheme

if TYPE_CHECKING:
    import torch

__all__ = [
    "inclusion_on_grid_",
    "row_dither",
    "sampled_entries",
    "statistics",
    "stored_normalisers",
]


def stored_normalisers(normalisers: list[torch.Tensor], scheme: SparseScheme) -> list[torch.Tensor]:
    """Return log Z as it is stored, which the inclusion rule and its readers see."""
    import torch

    step = scheme.quantisation.log_z_step
    return [torch.round(value / step) * step for value in normalisers]


def statistics(
    z_RV: torch.Tensor,
    temperatures: tuple[float, ...],
    exp_RV: torch.Tensor,
    more_RV: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Return logsumexp(z), and log Z_T and entropy [R, 1] of each temperature; z is at most 0."""
    import torch

    sums: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(temperature: float) -> None:
        total_R1 = exp_RV.sum(-1, keepdim=True)
        torch.mul(exp_RV, z_RV, out=more_RV)
        sums[temperature] = total_R1, more_RV.sum(-1, keepdim=True)

    for temperature in sorted(temperatures, key=lambda t: (t == 2.0, t == 1.0)):
        if temperature != 1.0:
            torch.mul(z_RV, 1 / temperature, out=exp_RV).exp_()
            take(temperature)
    if 2.0 in temperatures:  # one exponential serves both
        exp_RV.square_()
    else:
        torch.exp(z_RV, out=exp_RV)
    take(1.0)
    log_z_R1 = sums[1.0][0].log()
    normalisers, entropies = [], []
    for temperature in temperatures:
        total_R1, weighted_R1 = sums[temperature]
        lse_R1 = total_R1.log()
        normalisers.append(lse_R1 - log_z_R1 / temperature)
        entropies.append(lse_R1 - weighted_R1 / (total_R1 * temperature))
    return log_z_R1, normalisers, entropies


def row_dither(noise_R: torch.Tensor) -> torch.Tensor:
    """Return each row's dither in [-1/2, 1/2), float32 [R, 1]."""
    import torch

    return ((noise_R & 0xFFFFFF) * 2.0**-24 - 0.5).to(torch.float32).unsqueeze(-1)


def inclusion_on_grid_(
    log_p_RV: torch.Tensor,
    pi_RV: torch.Tensor,
    more_RV: torch.Tensor,
    normalisers: list[torch.Tensor],
    scheme: SparseScheme,
    dither_R1: torch.Tensor,
) -> None:
    """Put log p on its grid and write inclusion probabilities to `pi_RV`, in steps not cut yet.

    `more_RV` is memory to write to.
    """
    assert scheme.rule is not None
    _on_grid_(log_p_RV, scheme.quantisation.sampled_step, dither_R1)
    _ratio(log_p_RV, normalisers, scheme.rule, pi_RV, more_RV)
    pi_RV.mul_(float(1 << scheme.step_bits)).add_(0.5).clamp_(max=scheme.most_steps)


def sampled_entries(
    steps_RV: torch.Tensor,
    sums_RV: torch.Tensor,
    values_RK: torch.Tensor,
    ids_RK: torch.Tensor,
    label_R1: torch.Tensor,
    label_logprob_R1: torch.Tensor,
    normalisers: list[torch.Tensor],
    scheme: SparseScheme,
    noise_R: torch.Tensor,
    on_grid: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids and log p of K + D places [R, K + D], and the mass outside the always-kept ones.

    Args:
        steps_RV: int32, of all entries; those of the always-kept ones become 0.
        sums_RV: int32 memory to write to.
        values_RK: log p of the largest, from the largest on.
        ids_RK: theirs.
        label_R1: int64.
        label_logprob_R1: its log p.
        normalisers: log Z of each temperature, as stored.
        scheme: what is kept.
        noise_R: int64.
        on_grid: log p of ids [R, D] as it is stored.
    """
    import torch

    rule, vocab, bits = scheme.rule, steps_RV.shape[1], scheme.step_bits
    assert rule is not None
    ratio_RK, more_RK = torch.empty_like(values_RK), torch.empty_like(values_RK)
    _ratio(values_RK, normalisers, rule, ratio_RK, more_RK)
    always_kept_RK = ratio_RK >= 1
    always_kept_RK[:, : scheme.top_k] = True
    always_kept_RK &= ids_RK != label_R1
    steps_RV.scatter_(-1, ids_RK, steps_RV.gather(-1, ids_RK).masked_fill_(always_kept_RK, 0))
    steps_RV.scatter_(-1, label_R1, 0)
    torch.cumsum(steps_RV, -1, dtype=torch.int32, out=sums_RV)
    first_R1 = ((noise_R >> 24).unsqueeze(-1) << bits) >> 30
    marks_RD = first_R1 + (torch.arange(scheme.sampled_places, device=steps_RV.device) << bits)
    sampled_RD = torch.searchsorted(sums_RV, marks_RD.to(torch.int32), right=True)
    empty_RD = sampled_RD >= vocab
    sampled_RD = sampled_RD.masked_fill_(empty_RD, 0)
    mass_R1 = values_RK.exp().masked_fill_(~always_kept_RK, 0.0).sum(-1, keepdim=True)
    tail_R1 = 1.0 - mass_R1 - label_logprob_R1.exp()
    values = torch.cat([values_RK, on_grid(sampled_RD)], dim=-1)
    ids = torch.cat(
        [ids_RK.masked_fill(~always_kept_RK, -1), sampled_RD.masked_fill(empty_RD, -1)], dim=-1
    ).to(torch.float32)
    # An empty place carries 0, but a NaN row stays one.
    values = values.masked_fill(ids < 0, 0.0) + label_logprob_R1 * 0.0
    return _padded(ids, scheme, -1.0), _padded(values, scheme, 0.0), tail_R1


def _padded(entries: torch.Tensor, scheme: SparseScheme, value: float) -> torch.Tensor:
    """Fill up to K + D places where the vocabulary is smaller than K."""
    import torch

    missing = scheme.always_kept_places + scheme.sampled_places - entries.shape[1]
    if not missing:
        return entries
    return torch.nn.functional.pad(entries, (missing, 0), value=value)


def _on_grid_(log_p_RV: torch.Tensor, step: float, dither_R1: torch.Tensor) -> None:
    """Round log p to its row's grid of sampled values, in place."""
    log_p_RV.clamp_(min=-LOWEST_LOG_P).mul_(1 / step).add_(dither_R1).round_()
    log_p_RV.sub_(dither_R1).mul_(step)


def _ratio(
    log_p_RV: torch.Tensor,
    normalisers: list[torch.Tensor],
    rule: InclusionRule,
    pi_RV: torch.Tensor,
    more_RV: torch.Tensor,
) -> None:
    """Write `InclusionRule.ratio` to `pi_RV`.

    Below exp(-40) nothing is sampled; and numbers that are not normal take five times as long.
    """
    import torch

    used = {
        temperature: (tau, log_z)
        for temperature, tau, log_z in zip(rule.temperatures, rule.taus, normalisers, strict=True)
        if tau
    }
    if used.keys() == {1.0, 2.0}:  # with e = p^(1/2): e sqrt((e / tau_1)^2 + 1 / (Z tau_2)^2)
        (tau_1, _), (tau_2, log_z_R1) = used[1.0], used[2.0]
        torch.mul(log_p_RV, 0.5, out=pi_RV).exp_()
        torch.square(pi_RV, out=more_RV)
        more_RV.mul_(1 / tau_1**2).add_(torch.exp(-2 * log_z_R1) / tau_2**2).sqrt_()
        pi_RV.mul_(more_RV)
        return
    for index, (temperature, (tau, log_z_R1)) in enumerate(used.items()):
        target = more_RV if index else pi_RV
        shift_R1 = log_z_R1 + float(np.log(tau))
        if temperature == 1.0:
            torch.sub(log_p_RV, shift_R1, out=target)
        else:
            torch.mul(log_p_RV, 1 / temperature, out=target)
            target.sub_(shift_R1)
        target.clamp_(min=-40.0).exp_()
        if len(used) > 1:
            target.square_()
        if index:
            pi_RV.add_(more_RV)
    if len(used) > 1:
        pi_RV.sqrt_()
