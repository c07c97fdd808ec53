# ruff: noqa: ANN001, ANN202
"""`chunk_gradient` on a GPU: two Triton kernels around the [N, K] part of `entry_gradient`.

`_sums_kernel` reads a row once, in blocks, and keeps a running maximum with the sums of the
exponentials at both temperatures (online softmax, Milakov and Gimelshein 2018). `_combine_kernel`
reads it again and writes the gradient over it. Kept entries are hidden before the first and put
back after the second, so that the kernels need no indices; every divergence and tail policy works,
and 16-bit logits are never copied to 32 bits.

Importing this module needs Triton. Shapes: N tokens of the chunk, K entries, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.loss.entry_gradient import RowTerms, acceptance_of, read_entries
from pipeline.loss.gpu.compiled import Compiled
from pipeline.loss.gpu.finish import ExpSums, finish_entries
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets

__all__ = ["triton_loss_"]

_BLOCK = 4096
"""Logits of a row in registers at one time: 16 a thread."""
_WARPS = 8
_LOWEST = -1.0e30
"""Finite, so that a row without any token left sums to 0 instead of NaN."""


def triton_loss_(
    logits_NV: Tensor,
    targets: HeadTargets,
    spec: LossSpec,
    *,
    gradient: bool = True,
    predictions: bool = False,
    compile_entries: bool = False,
) -> RowTerms:
    """Compute the loss of each token and overwrite the logits with its gradient on them.

    Arguments and result are those of `chunk_gradient.sparse_loss_`.

    Args:
        logits_NV: float32, bfloat16 or float16, rows contiguous; DESTROYED. All arithmetic is in
            float32; only the stored values are rounded.
        targets: of the same N tokens.
        spec: temperature, alpha, divergence and tail policy.
        gradient: False skips the gradient; the logits are then left in an undefined state.
        predictions: also return the argmax and its log-probability.
        compile_entries: compile the operations on entries.
    """
    assert logits_NV.stride(1) == 1, "rows of logits are contiguous"
    compiled = compile_entries and len(logits_NV) > 0
    read, finish = (_READ, _FINISH) if compiled else (read_entries, finish_entries)
    top = logits_NV.max(-1) if predictions else None
    entries, hide_NK = read(logits_NV, targets, spec, dtype=torch.float32)
    logits_NV.scatter_add_(1, entries.ids_NK, hide_NK)
    sums = _sums(logits_NV, spec.temperature)
    terms = finish(
        entries, sums, targets, spec, vocab_size=logits_NV.shape[1], gradient=gradient,
        dtype=logits_NV.dtype,
    )  # fmt: skip
    if terms.kept_NK is not None and terms.factor_T_N is not None and terms.factor_1_N is not None:
        _combine_(logits_NV, sums.max_N, terms.factor_T_N, terms.factor_1_N, targets.label_N, spec)
        logits_NV.scatter_add_(1, entries.ids_NK, terms.kept_NK)
    return RowTerms(
        divergence_N=terms.divergence_N,
        ce_N=terms.ce_N,
        argmax_N=None if top is None else top.indices,
        argmax_logprob_N=None if top is None else top.values.float() - terms.log_z_1_N,
        acceptance_N=acceptance_of(entries, terms, targets, spec) if predictions else None,
    )


_READ, _FINISH = Compiled(read_entries), Compiled(finish_entries)


def _sums(x_NV: Tensor, temperature: float) -> ExpSums:
    """Sum the exponentials of the tokens that are not hidden."""
    rows, vocab_size = x_NV.shape
    max_N = torch.empty(rows, dtype=torch.float32, device=x_NV.device)
    sum_T_N, sum_1_N = torch.empty_like(max_N), torch.empty_like(max_N)
    if rows:
        _sums_kernel[(rows,)](
            x_NV, max_N, sum_T_N, sum_1_N, x_NV.stride(0), vocab_size, 1.0 / temperature,
            LOWEST=_LOWEST, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return ExpSums(max_N, sum_T_N, sum_1_N)


def _combine_(
    x_NV: Tensor,
    max_N: Tensor,
    factor_T_N: Tensor,
    factor_1_N: Tensor,
    label_N: Tensor,
    spec: LossSpec,
) -> None:
    """Overwrite what is not hidden by its gradient, the label's own term included."""
    rows, vocab_size = x_NV.shape
    if rows:
        _combine_kernel[(rows,)](
            x_NV, max_N, factor_T_N, factor_1_N, label_N, x_NV.stride(0), vocab_size,
            1.0 / spec.temperature, spec.alpha - 1.0,
            BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip


@triton.jit
def _sums_kernel(
    x_ptr, max_ptr, sum_t_ptr, sum_1_ptr, stride, vocab_size, inverse_t,
    LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    largest = LOWEST
    sum_t = 0.0
    sum_1 = 0.0
    for start in range(0, vocab_size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < vocab_size, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(x, axis=0))
        below = x - largest
        sum_t = sum_t * tl.exp((before - largest) * inverse_t) + tl.sum(tl.exp(below * inverse_t))
        sum_1 = sum_1 * tl.exp(before - largest) + tl.sum(tl.exp(below))
    tl.store(max_ptr + row, largest)
    tl.store(sum_t_ptr + row, sum_t)
    tl.store(sum_1_ptr + row, sum_1)


@triton.jit
def _combine_kernel(
    x_ptr, max_ptr, factor_t_ptr, factor_1_ptr, label_ptr, stride, vocab_size, inverse_t,
    label_part,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    largest = tl.load(max_ptr + row)
    factor_t = tl.load(factor_t_ptr + row)
    factor_1 = tl.load(factor_1_ptr + row)
    label = tl.load(label_ptr + row)
    for start in range(0, vocab_size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocab_size
        x = tl.load(x_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
        below = x - largest
        gradient = factor_t * tl.exp(below * inverse_t) + factor_1 * tl.exp(below)
        visible_label = (at == label) & (x > float("-inf"))
        gradient = tl.where(visible_label, gradient + label_part, gradient)
        tl.store(x_ptr + at, gradient.to(x_ptr.dtype.element_ty), mask=inside)
