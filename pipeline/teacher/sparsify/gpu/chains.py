"""The reduction in torch on a GPU, its chains of operations fused by torch.compile.

For what the kernels do not do. Two chains are compiled, the statistics and the inclusion
probabilities; selection is torch's own. 35 to 60 bytes an entry instead of 108 to 264, and no
memory but that of one array of the logits' size or two.

Legend: R rows, V vocabulary, K always-kept and D sampled places.
"""

from __future__ import annotations

import torch

from pipeline.loss.gpu.compiled import Compiled
from pipeline.teacher.sparsify.reduction import (
    inclusion_on_grid_,
    row_dither,
    sampled_entries,
    statistics,
    stored_normalisers,
)
from pipeline.teacher.sparsify.sparse_scheme import SparseScheme

__all__ = ["chained_sparsify"]

_Rows = list[torch.Tensor]


def chained_sparsify(
    logits_RV: torch.Tensor,
    label_R: torch.Tensor,
    scheme: SparseScheme,
    noise_R: torch.Tensor,
    *,
    compiled: bool = True,
) -> torch.Tensor:
    """Reduce rows of logits to columns; arguments and result are those of `device.sparsify`.

    Args:
        logits_RV: any floating dtype.
        label_R: int64.
        scheme: what to keep.
        noise_R: int64.
        compiled: fuse the chains; where that fails, one warning says so and they run as they are.
    """
    sums, steps = (_SUMS, _STEPS) if compiled else (_sums, _steps)
    largest_R1, log_z_R1, normalisers, entropies = sums(logits_RV, scheme.temperatures)
    label_R1 = label_R.unsqueeze(-1)

    def log_p(ids_RK: torch.Tensor) -> torch.Tensor:
        return logits_RV.gather(-1, ids_RK).float() - largest_R1 - log_z_R1

    label_logprob_R1 = log_p(label_R1)
    places = min(scheme.always_kept_places, logits_RV.shape[1])
    ids_RK = torch.topk(logits_RV, places, dim=-1).indices
    values = log_p(ids_RK)
    if scheme.rule is None:
        tail_R1, ids = 1.0 - values.exp().sum(-1, keepdim=True), ids_RK.to(torch.float32)
    else:
        normalisers = stored_normalisers(normalisers, scheme)
        dither_R1 = row_dither(noise_R)
        steps_RV = steps(logits_RV, largest_R1, log_z_R1, normalisers, scheme, dither_R1)

        def on_grid(ids_RD: torch.Tensor) -> torch.Tensor:
            log_p_RD = log_p(ids_RD)
            inclusion_on_grid_(
                log_p_RD, torch.empty_like(log_p_RD), torch.empty_like(log_p_RD), normalisers,
                scheme, dither_R1,
            )  # fmt: skip
            return log_p_RD

        ids, values, tail_R1 = sampled_entries(
            steps_RV, torch.empty_like(steps_RV), values, ids_RK, label_R1, label_logprob_R1,
            normalisers, scheme, noise_R, on_grid,
        )  # fmt: skip
    return torch.cat(
        [label_logprob_R1, tail_R1.clamp(0.0, 1.0), *normalisers, *entropies, ids, values], dim=-1
    )


def _sums(
    logits_RV: torch.Tensor, temperatures: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor, _Rows, _Rows]:
    """Return maximum, log of the sum from it on, log Z and entropy of each temperature, [R, 1]."""
    z_RV = logits_RV.to(torch.float32)
    largest_R1 = z_RV.amax(-1, keepdim=True)
    z_RV = z_RV - largest_R1
    found = statistics(z_RV, temperatures, torch.empty_like(z_RV), torch.empty_like(z_RV))
    return largest_R1, *found


def _steps(
    logits_RV: torch.Tensor,
    largest_R1: torch.Tensor,
    log_z_R1: torch.Tensor,
    normalisers: _Rows,
    scheme: SparseScheme,
    dither_R1: torch.Tensor,
) -> torch.Tensor:
    """Return inclusion probabilities in whole steps, int32 [R, V]."""
    log_p_RV = logits_RV.to(torch.float32) - largest_R1 - log_z_R1
    pi_RV, more_RV = torch.empty_like(log_p_RV), torch.empty_like(log_p_RV)
    inclusion_on_grid_(log_p_RV, pi_RV, more_RV, normalisers, scheme, dither_R1)
    return pi_RV.to(torch.int32)


_WHAT = "the reduction of logits"
_SUMS, _STEPS = Compiled(_sums, what=_WHAT), Compiled(_steps, what=_WHAT)
