"""The loss of a chunk of logits and its gradient, which overwrites the logits.

The kept entries are removed from the row; the exponentials of the other logits, times one factor
per row and temperature, are the gradient of those tokens; then the kept entries' gradients
(`entry_gradient`) are written in their places. There is no cancellation (the tail is summed, never
computed as 1 minus the rest), and a row is read four or five times, from the processor's cache. On
CUDA `chunk_gradient_triton` does the same in two passes.

Shapes: N tokens of the chunk, K entries of the fullest one, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from pipeline.cpu_blocks import for_each_block
from pipeline.loss.entry_gradient import (
    RowTerms,
    TailSums,
    acceptance_of,
    entry_terms,
    join_rows,
    take_entries_,
)
from pipeline.loss.on_policy.written_token import written_token_targets
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets

__all__ = ["sparse_loss_"]

_CPU_BLOCK_BYTES = 8 << 20
"""Bytes of the rows processed together on a CPU: few enough to stay in its cache over all passes.
A thread takes whole blocks: divided among two, the hundred operations of a block took 8 to 12 ms a
row at V = 151,936 where every core had another busy process, one thread 1.6 to 3.4."""
_CPU_BLOCK_ROWS = 16
"""At least this many rows: the hundred small operations of a block cost 0.7 ms, whatever its size.
At V = 151,936 five rows (3 MB) took 0.51 ms a token, 16 take 0.37 (T = 1), of the matmuls' 12."""


def sparse_loss_(
    logits_NV: Tensor,
    targets: HeadTargets,
    spec: LossSpec,
    *,
    gradient: bool = True,
    predictions: bool = False,
    compile_entries: bool = True,
) -> RowTerms:
    """Compute the loss of each token and overwrite the logits with its gradient on them.

    The gradient is that of `alpha * T^2 * D(p_T, q_T) + (1 - alpha) * CE`, summed over the rows:
    at T = 1 both parts share one softmax, at T = 2 the second is the square of the first.

    Args:
        logits_NV: float64, float32, bfloat16 or float16; DESTROYED. 16-bit logits are processed in
            float32, block by block.
        targets: of the same N tokens.
        spec: temperature, alpha, divergence and tail policy.
        gradient: False skips the gradient; the logits are then left in an undefined state.
        predictions: also return the argmax and its log-probability.
        compile_entries: on a GPU, compile the operations on entries.

    Returns:
        Per-token terms in float32 (float64 for float64 logits), without gradient history.
    """
    if spec.divergence == "sampled_reverse_kl":
        targets = written_token_targets(targets)
    if logits_NV.is_cuda and logits_NV.dtype != torch.float64 and _has_triton():
        from pipeline.loss.chunk_gradient_triton import triton_loss_

        return triton_loss_(
            logits_NV, targets, spec, gradient=gradient, predictions=predictions,
            compile_entries=compile_entries,
        )  # fmt: skip
    rows, vocab_size = logits_NV.shape
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    parts: dict[int, RowTerms] = {}

    def work(start: int, stop: int) -> None:
        logits_nV = logits_NV[start:stop]
        work_nV = logits_nV.to(dtype)  # the same memory when the type is already right
        parts[start] = _block_(work_nV, targets.rows(start, stop), spec, gradient, predictions)
        if gradient and work_nV.dtype != logits_nV.dtype:
            logits_nV.copy_(work_nV)

    if logits_NV.device.type != "cpu" or not rows:
        work(0, rows)
    else:
        block = max(_CPU_BLOCK_ROWS, _CPU_BLOCK_BYTES // (vocab_size * dtype.itemsize))

        def open_worker() -> Callable[[int], None]:
            return lambda start: work(start, start + block)

        for_each_block(range(0, rows, block), open_worker)
    return join_rows([parts[start] for start in sorted(parts)])


def _block_(
    x_NV: Tensor, targets: HeadTargets, spec: LossSpec, gradient: bool, predictions: bool
) -> RowTerms:
    """Process rows that fit the processor's cache; `x_NV` becomes the gradient."""
    top = x_NV.max(-1) if predictions else None
    entries = take_entries_(x_NV, targets, spec, dtype=x_NV.dtype)
    tail, exp_1_NV = _exponentials_(x_NV, spec.temperature)
    terms = entry_terms(entries, tail, targets, spec, vocab_size=x_NV.shape[1], gradient=gradient)
    if terms.kept_NK is not None and terms.factor_T_N is not None and terms.factor_1_N is not None:
        _combine_(
            x_NV, exp_1_NV, spec.temperature, terms.factor_T_N[:, None], terms.factor_1_N[:, None]
        )
        x_NV.scatter_add_(1, entries.ids_NK, terms.kept_NK)  # kept entries hold 0 by now
        label_N1 = torch.full_like(entries.z_label_N, spec.alpha - 1)[:, None]
        x_NV.scatter_add_(1, targets.label_N[:, None], label_N1)
    return RowTerms(
        divergence_N=terms.divergence_N,
        ce_N=terms.ce_N,
        argmax_N=None if top is None else top.indices,
        argmax_logprob_N=None if top is None else top.values - terms.log_z_1_N,
        acceptance_N=acceptance_of(entries, terms, targets, spec) if predictions else None,
    )


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _exponentials_(x_NV: Tensor, temperature: float) -> tuple[TailSums, Tensor | None]:
    """Replace logits by exp((z - max) / T) and sum them; hidden tokens give 0.

    Also returns exp(z - max), where it cannot be computed from the exponentials at T.
    """
    limits = torch.finfo(x_NV.dtype)
    # A row without any token left has max = -inf; a finite one makes its sum 0 instead of NaN.
    max_N1 = x_NV.amax(-1, keepdim=True).clamp_(min=limits.min)
    max_N = max_N1[:, 0]
    exp_1_NV = None
    if temperature == 1.0:
        sum_T_N = x_NV.sub_(max_N1).exp_().sum(-1)
        sum_1_N = sum_T_N
    elif temperature == 2.0:
        # (z - max) / 2 in one pass, and exactly: halving is exact.
        sum_T_N = torch.add(max_N1 * -0.5, x_NV, alpha=0.5, out=x_NV).exp_().sum(-1)
        sum_1_N = torch.linalg.vector_norm(x_NV, dim=-1).square_()
    else:
        exp_1_NV = x_NV.sub_(max_N1).exp()
        sum_1_N = exp_1_NV.sum(-1)
        sum_T_N = x_NV.mul_(1.0 / temperature).exp_().sum(-1)
    sums = TailSums(
        max_N=max_N,
        sum_T_N=sum_T_N.clamp(min=limits.tiny),
        log_sum_T_N=(max_N / temperature + sum_T_N.log()).clamp_(min=limits.min),
        log_sum_1_N=max_N + sum_1_N.log(),
    )
    return sums, exp_1_NV


def _combine_(
    exp_T_NV: Tensor,
    exp_1_NV: Tensor | None,
    temperature: float,
    divergence_N1: Tensor,
    ce_N1: Tensor,
) -> None:
    """Overwrite exp_T by `divergence * exp_T + ce * exp_1`, with one factor of each per row."""
    # Plain mul and add: torch's addcmul with per-row factors takes three times as long.
    if temperature == 1.0:
        exp_T_NV.mul_(divergence_N1 + ce_N1)
    elif exp_1_NV is None:  # T = 2: exp_1 is the square of exp_T
        exp_T_NV.mul_((exp_T_NV * ce_N1).add_(divergence_N1))
    else:
        exp_T_NV.mul_(divergence_N1).add_(exp_1_NV.mul_(ce_N1))
