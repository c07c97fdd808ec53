"""The gradient's matrix products: a 16-bit weight's summed in float32, hidden states' past padding.

Shapes: n tokens of the chunk, D hidden, P columns of the matrix products, U of them in use, J rows
from the last multiple of 64 below U to P.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pipeline.loss.gpu.chunks import ALIGNMENT

__all__ = ["add_product_", "clean_last_rows", "device_bytes", "write_product_"]


def add_product_(sum_PD: Tensor, grad_nP: Tensor, hidden_nD: Tensor, *, first: bool) -> None:
    """Add `grad.T @ hidden` to the sum, or overwrite it with that.

    On CUDA the product of 16-bit matrices goes straight into the float32 sum: 8 bytes a weight
    (the sum read and written) instead of 12, no temporary, and no rounding to 16 bits in between.

    Args:
        sum_PD: float32 or float64.
        grad_nP: of the sum's type, or of 16 bits.
        hidden_nD: of the gradient's type.
        first: overwrite.
    """
    if sum_PD.dtype == grad_nP.dtype:
        sum_PD.addmm_(grad_nP.t(), hidden_nD, beta=0 if first else 1)
    elif _sums_wide(grad_nP.device, grad_nP.dtype):
        _add_wide_(sum_PD, grad_nP.t(), hidden_nD, beta=0 if first else 1)
    elif first:
        sum_PD.copy_(grad_nP.t() @ hidden_nD)
    else:
        sum_PD.add_(grad_nP.t() @ hidden_nD)


def clean_last_rows(weight_PD: Tensor, used: int) -> Tensor | None:
    """Return the last rows of a weight with zeros for padding, [J, D]; None where there is none.

    Rows that no token has are whatever they were made as, and 0 times NaN or infinity is NaN.

    Args:
        weight_PD: as wide as the matrix products.
        used: U, the rows that tokens have.
    """
    if used == len(weight_PD):
        return None
    first = used // ALIGNMENT * ALIGNMENT
    last_JD = weight_PD[first:].clone()
    last_JD[used - first :] = 0
    return last_JD


def write_product_(
    out_nD: Tensor, grad_nP: Tensor, weight_PD: Tensor, last_JD: Tensor | None
) -> None:
    """Write `grad @ weight`, with `last_JD` in the place of the weight's last rows.

    Both parts begin at multiples of 64 columns, so that the long one is as aligned as the whole.
    The short one is written first: what rounding to 16 bits in between costs is of its size.
    """
    if last_JD is None:
        torch.mm(grad_nP, weight_PD, out=out_nD)
        return
    first = len(weight_PD) - len(last_JD)
    torch.mm(grad_nP[:, first:], last_JD, out=out_nD)
    if first:
        out_nD.addmm_(grad_nP[:, :first], weight_PD[:first])


def device_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU, None for other devices."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def _add_wide_(sum_PD: Tensor, a_Pn: Tensor, b_nD: Tensor, *, beta: int) -> None:
    torch.addmm(sum_PD, a_Pn, b_nD, out_dtype=sum_PD.dtype, beta=beta, out=sum_PD)


def _sums_wide(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and _adds_in_place(device, dtype)


@cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch and device add a 16-bit product to a float32 sum in place, and rightly.

    torch 2.13 does on CUDA; earlier ones want the sum in 16 bits as well, and ROCm refuses.
    """
    ones = torch.ones(8, 8, dtype=dtype, device=device)
    total = torch.ones(8, 8, dtype=torch.float32, device=device)
    try:
        _add_wide_(total, ones, ones, beta=1)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 9).all())
