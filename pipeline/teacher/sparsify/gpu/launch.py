"""Launches the reduction's kernels; the columns are those of `sparsify`.

Importing this module needs Triton. Shapes: R rows, V vocabulary, C columns, K of top-k, P places
for candidates.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pipeline.teacher.sparsify.gpu.kernels import (
    candidates_kernel,
    draw_kernel,
    statistics_kernel,
    top_kernel,
)
from pipeline.teacher.sparsify.gpu.plan import (
    BLOCK,
    candidate_places,
    kernel_temperatures,
)
from pipeline.teacher.sparsify.sparse_scheme import LOWEST_LOG_P, SparseScheme

__all__ = ["triton_sparsify"]

WARPS = 8
LOWEST = -3.0e38
"""Finite, so that a sum that has not begun is scaled to 0 instead of NaN."""
# Products and sums are rounded one by one, as torch does: a rounding to the grid does not turn.
OPTIONS: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": False}


def triton_sparsify(
    logits_RV: torch.Tensor,
    label_R: torch.Tensor,
    scheme: SparseScheme,
    noise_R: torch.Tensor,
) -> torch.Tensor:
    """Reduce rows of logits to columns; arguments and result are those of `device.sparsify`.

    Places of always-kept entries of an inclusion rule are in the order of ids. Of equal logits at
    the end of top-k those with the smaller ids are kept.

    Args:
        logits_RV: float32, bfloat16 or float16, entries of a row side by side; R at least 1.
        label_R: int64.
        scheme: one that `plan.not_covered` does not refuse.
        noise_R: int64.
    """
    rows, vocab = logits_RV.shape
    device = logits_RV.device
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    columns_RC = torch.empty((rows, scheme.num_columns), dtype=torch.float32, device=device)
    row_RS = torch.empty((rows, 2), dtype=torch.float32, device=device)
    border_R = torch.empty(rows, dtype=torch.int64, device=device)
    strides = logits_RV.stride(0), columns_RC.stride(0)
    grid = scheme.temperatures
    summed = kernel_temperatures(scheme)
    statistics_kernel[(rows,)](
        logits_RV, label_R, columns_RC, row_RS, border_R, *strides, vocab,
        summed, tuple(math.log2(math.e) / value for value in summed),
        scheme.quantisation.log_z_step,
        COUNT=len(summed), GRID=len(grid), ONE=summed.index(1.0),
        ROUNDED=scheme.rule is not None, TOP=scheme.top_k, LOWEST=LOWEST, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    keys_RK = None
    if scheme.top_k == 1:
        keys_RK = border_R[:, None]
    elif scheme.top_k:
        places = candidate_places(scheme.top_k)
        keys_RP = torch.full((rows, places), torch.iinfo(torch.int64).min, device=device)
        candidates_kernel[(rows,)](
            logits_RV, border_R, keys_RP, strides[0], vocab,
            TOP=scheme.top_k, CAPACITY=places, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
        # No two keys are equal, so this has one result.
        keys_RK = torch.topk(keys_RP, scheme.top_k, dim=-1).values
    if scheme.rule is not None:
        last_R = label_R if keys_RK is None else keys_RK[:, -1].contiguous()
        _draw(logits_RV, label_R, noise_R, last_R, row_RS, columns_RC, scheme)
    elif keys_RK is not None:
        top_kernel[(rows,)](
            keys_RK, row_RS, columns_RC, strides[1],
            GRID=len(grid), TOP=scheme.top_k, PADDED=_power_of_2(scheme.top_k), **OPTIONS,
        )  # fmt: skip
    return columns_RC


def _draw(
    logits_RV: torch.Tensor,
    label_R: torch.Tensor,
    noise_R: torch.Tensor,
    last_R: torch.Tensor,
    row_RS: torch.Tensor,
    columns_RC: torch.Tensor,
    scheme: SparseScheme,
) -> None:
    rule, step = scheme.rule, scheme.quantisation.sampled_step
    assert rule is not None
    used = [g for g, tau in enumerate(rule.taus) if tau]
    temperatures = tuple(rule.temperatures[g] for g in used)
    taus = tuple(rule.taus[g] for g in used)
    both = set(temperatures) == {1.0, 2.0}
    if both and temperatures[0] != 1.0:
        used, temperatures, taus = used[::-1], temperatures[::-1], taus[::-1]
    draw_kernel[(len(logits_RV),)](
        logits_RV, label_R, noise_R, last_R, row_RS, columns_RC,
        logits_RV.stride(0), columns_RC.stride(0), logits_RV.shape[1],
        temperatures, tuple(1 / value for value in temperatures),
        tuple(math.log(tau) for tau in taus), tuple(1 / tau**2 for tau in taus), tuple(used),
        step, 1 / step, scheme.most_steps,
        GRID=len(scheme.temperatures), USED=len(used), BOTH=both, TOP=scheme.top_k,
        ALWAYS=scheme.always_kept_places, SAMPLED=scheme.sampled_places, BITS=scheme.step_bits,
        PADDED=_power_of_2(max(scheme.always_kept_places, scheme.sampled_places)),
        FARTHEST=-LOWEST_LOG_P, LOWEST=LOWEST, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip


def _power_of_2(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
