"""A head over dense logits by the reference: what the fused one is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.loss import reference
from pipeline.loss.fused import FusedSpec
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets

MakeTargets = Callable[..., tuple[HeadTargets, Tensor]]
SPEC = FusedSpec(LossSpec(temperature=2.0, alpha=0.5), chunk_rows=3)
N, D, V = 10, 6, 23


def inputs(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return hidden [N, D], weight [V, D] and bias [V], all requiring gradients."""
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((N, D), (V, D), (V,))
    )


def dense(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: HeadTargets, spec: FusedSpec
) -> list[Tensor]:
    """Return the reference's loss and its gradients on the three inputs."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    logits = leaves[0] @ leaves[1][: spec.valid_vocab].T
    if bias is not None:
        logits = logits + leaves[2][: spec.valid_vocab]
    if spec.softcap is not None:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    loss = reference.loss_sum(logits, targets, spec.loss)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]
