"""The distillation loss as a function of logits, for trainers that keep their own forward pass.

The head of `fused` holds one chunk of logits; this holds what the model gave and one copy of it,
which becomes the gradient.

Shapes: N supervised tokens, V rows of the head, U of them in use (the vocabulary).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets, LossTerms, weighted_loss

__all__ = ["logits_loss"]


def logits_loss(
    logits_NV: Tensor, targets: HeadTargets, *, spec: LossSpec, valid_vocab: int | None = None
) -> LossTerms:
    """Compute the distillation loss of N tokens from their logits.

    The gradient is computed in the forward pass; a second derivative raises RuntimeError.

    Args:
        logits_NV: as the model returns them, soft cap and scale applied; not changed.
        targets: of the same N tokens.
        spec: temperature, alpha, divergence and tail policy.
        valid_vocab: U; columns from here on are padding and get no mass and no gradient.
    """
    outputs = _LogitsLoss.apply(  # type: ignore[no-untyped-call]
        logits_NV, targets, spec, valid_vocab
    )
    return LossTerms(*outputs)


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        targets: HeadTargets,
        spec: LossSpec,
        valid_vocab: int | None,
    ) -> tuple[Tensor, ...]:
        needed, weight_N = bool(ctx.needs_input_grad[0]), targets.weight_N
        work_NV = logits_NV.detach().clone()
        terms = sparse_loss_(work_NV[:, :valid_vocab], targets, spec, gradient=needed)
        if needed:
            if valid_vocab is not None:
                work_NV[:, valid_vocab:] = 0
            if weight_N is not None:
                work_NV.mul_(weight_N[:, None])
            ctx.save_for_backward(work_NV)
        loss = weighted_loss(terms.divergence_N, terms.ce_N, weight_N, spec)
        ctx.mark_non_differentiable(terms.divergence_N, terms.ce_N)
        ctx.set_materialize_grads(False)
        return loss, terms.divergence_N, terms.ce_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only with create_graph=True
            raise RuntimeError("the loss has no second derivative (create_graph=True)")
        if grad_loss is None:
            return (None,) * 4
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * grad_loss.to(gradient_NV.dtype), None, None, None
