"""The head's matrix product and the loss in one function that never holds [N, V] logits.

The gradient is computed in the forward pass, chunk by chunk, while the logits are in memory; the
backward pass only multiplies it by the incoming gradient. After Liger-Kernel's fused linear
cross-entropy (Hsu et al. 2024), here with sparse teacher targets.

Shapes: N supervised tokens, D hidden, V rows of the head, U of them in use (the vocabulary), P
columns of the matrix products (U, on a GPU up to the next multiple of 64), S from row to row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.entry_gradient import RowTerms, join_rows
from pipeline.loss.gpu.chunks import ChunkLayout, chunk_layout
from pipeline.loss.gpu.products import add_product_, clean_last_rows, device_bytes, write_product_
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets, LossTerms, weighted_loss
from pipeline.loss.uld import uld_loss_

__all__ = ["FusedSpec", "fused_head_loss"]


@dataclass(frozen=True, slots=True)
class FusedSpec:
    """How the fused head computes; no tensors."""

    loss: LossSpec
    chunk_rows: int | None
    """Tokens per chunk: memory is this times the vocabulary, in the weight's dtype. None: 512 on a
    CPU, on a GPU by its memory."""
    softcap: float | None = None
    """logits = softcap * tanh(logits / softcap), as in Gemma 2; None for none."""
    valid_vocab: int | None = None
    """U: head rows from here on are padding: no mass, no gradient. None: all are valid."""
    compile_entries: bool = True
    """On a GPU: compile the operations on entries."""


def fused_head_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: HeadTargets,
    *,
    spec: FusedSpec,
    predictions: bool = False,
) -> LossTerms:
    """Compute the distillation loss of N tokens from hidden states and the head's weight.

    Extra memory: one chunk of logits and the gradients themselves (that of a 16-bit weight is
    summed in float32). No gradient is computed for an input that needs none; under
    `torch.no_grad()` only the values are computed.

    Inside activation checkpointing the loss is correct but computed twice: exclude the head from
    it. A second backward pass or a second derivative raises RuntimeError.

    Args:
        hidden_ND: the hidden states that predict the supervised tokens, in the weight's dtype.
        weight_VD: the head's weight.
        bias_V: the head's bias, or None.
        targets: of the same N tokens.
        spec: how to compute.
        predictions: also return the argmax and its log-probability.
    """
    needs = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden_ND, weight_VD, bias_V)
    )
    if not needs:
        with torch.no_grad():
            terms, _ = _run(
                hidden_ND, weight_VD, bias_V, targets, spec, (False, False, False), predictions
            )
        return terms
    outputs = _FusedHead.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, bias_V, targets, spec, predictions
    )
    return LossTerms(*outputs)


class _Gradients(NamedTuple):
    """Gradients of the summed loss; None where not needed."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


class _FusedHead(torch.autograd.Function):
    """Gradient in forward; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets: HeadTargets,
        spec: FusedSpec,
        predictions: bool,
    ) -> tuple[Tensor | None, ...]:
        needs = tuple(ctx.needs_input_grad[:3])
        terms, gradients = _run(hidden_ND, weight_VD, bias_V, targets, spec, needs, predictions)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(term for term in terms[1:] if term is not None))
        # Not save_for_backward: these are neither inputs nor outputs, and backward changes them.
        ctx.gradients = gradients
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only with create_graph=True
            raise RuntimeError("the fused head has no second derivative (create_graph=True)")
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "backward ran twice through the fused head; its gradient is used up after one pass"
            )
        if grad_loss is None:
            return (None,) * 6
        scaled = (
            None if grad is None else _scaled(grad, grad_loss, dtype)
            for grad, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient times a scalar, of the given type; the gradient is used up."""
    if grad.dtype == dtype or not grad.is_cuda:
        return grad.mul_(factor).to(dtype)
    # In one pass: 6 bytes a number instead of 14.
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def _run(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: HeadTargets,
    spec: FusedSpec,
    needs: tuple[bool, ...],
    predictions: bool,
) -> tuple[LossTerms, _Gradients]:
    """Loop over the chunks; `needs` says which of hidden, weight, bias need a gradient."""
    layout = _layout(hidden_ND, weight_VD, spec)
    vocab_size, products = layout.vocab, layout.products
    weight_PD = weight_VD[:products]
    bias_P = None if bias_V is None else bias_V[:products]
    num_tokens = hidden_ND.shape[0]
    last_JD = clean_last_rows(weight_PD, vocab_size) if needs[0] else None
    gradients = _allocate(hidden_ND, weight_VD, bias_V, products, needs)
    buffer_CS = hidden_ND.new_empty(min(layout.rows, num_tokens), layout.stride)
    loss_ = _loss_of(spec)
    parts: list[RowTerms] = []
    for start in range(0, num_tokens, layout.rows):
        hidden_nD = hidden_ND[start : start + layout.rows]
        logits_nP = buffer_CS[: hidden_nD.shape[0], :products]
        logits_nU = logits_nP[:, :vocab_size]
        _logits(hidden_nD, weight_PD, bias_P, out=logits_nP)
        tanh_nU = _softcap_(logits_nU, spec.softcap) if spec.softcap else None
        part = loss_(
            logits_nU,
            targets.rows(start, start + layout.rows),
            spec.loss,
            gradient=any(needs),
            predictions=predictions,
        )
        parts.append(part)
        if not any(needs):
            continue
        if tanh_nU is not None:  # d softcap(x) / dx = 1 - tanh^2
            logits_nU.addcmul_(logits_nU, tanh_nU.square_(), value=-1)
        if products > vocab_size:
            logits_nP[:, vocab_size:].zero_()  # no gradient through the padding
        weight_n1 = None
        if targets.weight_N is not None:
            weight_n1 = targets.weight_N[start : start + len(hidden_nD), None]
        if gradients.hidden_ND is not None:
            grad_nD = gradients.hidden_ND[start : start + len(hidden_nD)]
            write_product_(grad_nD, logits_nP, weight_PD, last_JD)
            if weight_n1 is not None:
                grad_nD.mul_(weight_n1)
        if gradients.weight_VD is not None:
            # On the hidden states: D numbers a token instead of V.
            right_nD = hidden_nD
            if weight_n1 is not None:
                right_nD = (hidden_nD * weight_n1).to(hidden_nD.dtype)
            add_product_(gradients.weight_VD[:products], logits_nP, right_nD, first=start == 0)
        if gradients.bias_V is not None:
            if weight_n1 is not None:
                logits_nU.mul_(weight_n1)
            gradients.bias_V[:vocab_size] += logits_nU.sum(0, dtype=gradients.bias_V.dtype)
    if not parts:
        empty_0U = buffer_CS[:, :vocab_size]
        none = loss_(empty_0U, targets, spec.loss, gradient=False, predictions=predictions)
        parts.append(none)
    return _collect(parts, spec.loss, targets.weight_N), gradients


def _layout(hidden_ND: Tensor, weight_VD: Tensor, spec: FusedSpec) -> ChunkLayout:
    """Return how the chunks of these tensors lie on their device."""
    return chunk_layout(
        chunk_rows=spec.chunk_rows,
        vocab=len(weight_VD[: spec.valid_vocab]),
        head_rows=len(weight_VD),
        element_bytes=hidden_ND.element_size(),
        device_bytes=device_bytes(hidden_ND.device),
        arrays=2 if spec.softcap else 1,
    )


def _loss_of(spec: FusedSpec) -> Callable[..., RowTerms]:
    if spec.loss.cross_tokenizer == "uld":
        return uld_loss_
    return partial(sparse_loss_, compile_entries=spec.compile_entries)


def _allocate(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    products: int,
    needs: tuple[bool, ...],
) -> _Gradients:
    """Allocate gradients; the first chunk overwrites `products` rows of the weight's, later add."""
    wide = torch.float64 if weight_VD.dtype == torch.float64 else torch.float32
    grad_weight = None
    if needs[1]:
        grad_weight = torch.empty_like(weight_VD, dtype=wide)
        written = products if len(hidden_ND) else 0
        grad_weight[written:].zero_()
    return _Gradients(
        hidden_ND=torch.empty_like(hidden_ND) if needs[0] else None,
        weight_VD=grad_weight,
        bias_V=torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and needs[2] else None,
    )


def _logits(hidden_nD: Tensor, weight_PD: Tensor, bias_P: Tensor | None, *, out: Tensor) -> None:
    """Write `hidden @ weight.T + bias` to `out`."""
    if bias_P is None:
        torch.mm(hidden_nD, weight_PD.t(), out=out)
    else:
        torch.addmm(bias_P, hidden_nD, weight_PD.t(), out=out)


def _softcap_(logits_nU: Tensor, softcap: float) -> Tensor:
    """Apply the soft cap in place and return its tanh, which the gradient needs."""
    tanh_nU = logits_nU.div_(softcap).tanh_().clone()
    logits_nU.mul_(softcap)
    return tanh_nU


def _collect(parts: list[RowTerms], spec: LossSpec, weight_N: Tensor | None) -> LossTerms:
    """Join the chunks' terms and sum them to the loss."""
    rows = join_rows(parts)
    return LossTerms(weighted_loss(rows.divergence_N, rows.ce_N, weight_N, spec), *rows)
