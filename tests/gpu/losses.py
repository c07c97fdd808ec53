"""The loss inside the head: against float64, and its time over the head's matrix products.

Legend: N supervised tokens, K entries, V vocabulary, U rows of the head in use, D hidden.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from pipeline.loss import reference
from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.fused import FusedSpec, fused_head_loss
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from tests.gpu.check import Figure, Place, at_most

__all__ = ["against_float64", "over_matmuls", "past_32_bits"]

ODD, GEMMA = 151_669, 262_144
"""Rows in use of Qwen3's head; the head of Gemma 3."""
_SPECS = [
    LossSpec(1.0, 0.5), LossSpec(2.0, 0.5), LossSpec(2.0, 0.5, "auto", "reverse_kl"),
    LossSpec(1.0, 0.5, "auto", "jensen_shannon"),
]  # fmt: skip


def draw_targets(
    rows: int, vocab: int, device: str, *, entries: int = 64, sampled: bool = False
) -> HeadTargets:
    """Return targets with the mass of a real teacher: most of it on few tokens."""
    draw = torch.Generator(device).manual_seed(rows + vocab)
    options = {"generator": draw, "device": device}
    # One id from each of K equal ranges: distinct and ascending, as a cache has them.
    width = vocab // entries
    ids_NK = torch.arange(entries, device=device) * width + torch.randint(
        0, width, (rows, entries), **options
    )
    weight_NK = torch.rand(rows, entries, **options).pow(8) + 1e-6
    logprobs_NK = (0.9 * weight_NK / weight_NK.sum(-1, keepdim=True)).log()
    inclusion_NK = (torch.rand(rows, entries, **options) + 0.3).clamp(max=1) if sampled else None
    label_N = torch.randint(0, vocab, (rows,), **options)
    label_N[::2] = ids_NK[::2, 3]
    zeros_N = torch.zeros(rows, device=device)
    return HeadTargets(ids_NK, logprobs_NK, inclusion_NK, zeros_N, zeros_N + 1, label_N)


def against_float64(place: Place) -> list[Figure]:
    """Compare loss and gradient of each kind with the dense float64 reference, V odd and large."""
    device = place.device
    rows = 64 if device == "cuda" else 4
    worst = {torch.float32: 0.0, torch.bfloat16: 0.0}
    largest = 0.0
    for vocab, dtype, sampled in product((ODD, GEMMA), worst, (False, True)):
        draw = torch.Generator(device).manual_seed(vocab)
        logits_NV = (torch.randn(rows, vocab, generator=draw, device=device) * 3).to(dtype)
        targets = draw_targets(rows, vocab, device, sampled=sampled)
        for spec in _SPECS:
            leaf_NV = logits_NV.double().requires_grad_()
            reference.loss_sum(leaf_NV, targets, spec).backward()
            assert leaf_NV.grad is not None
            divergence_N = reference.sparse_divergence(leaf_NV.detach(), targets, spec)
            buffer_NV = logits_NV.clone()
            terms = sparse_loss_(buffer_NV, targets, spec)
            error_NV = (buffer_NV.double() - leaf_NV.grad).abs()
            # A stored gradient is rounded once, to the type of the logits.
            scale = float(leaf_NV.grad.abs().amax())
            worst[dtype] = max(worst[dtype], float(error_NV.amax()) / scale)
            error_N = (terms.divergence_N.double() - divergence_N).abs()
            largest = max(largest, float((error_N / (1 + divergence_N.abs())).amax()))
    return [
        at_most("gradient_error_float32", worst[torch.float32], 1e-5),
        at_most("gradient_error_bfloat16", worst[torch.bfloat16], 2**-7),
        at_most("divergence_error", largest, 2e-4),
    ]


def past_32_bits(place: Place) -> list[Figure]:
    """Compare rows on both sides of element 2^31 of one chunk with the same rows alone."""
    device = place.device
    rows, vocab = (1 << 31) // GEMMA + 64, GEMMA
    draw = torch.Generator(device).manual_seed(1)
    logits_NV = torch.empty(rows, vocab, dtype=torch.bfloat16, device=device)
    logits_NV.normal_(generator=draw)
    targets, spec = draw_targets(rows, vocab, device), LossSpec(2.0, 0.5)
    picked_N = torch.tensor([0, rows // 2, *range(rows - 72, rows)], device=device)
    alone_NV = logits_NV[picked_N].clone()
    few = HeadTargets(*(None if part is None else part[picked_N] for part in targets))
    terms, alone = sparse_loss_(logits_NV, targets, spec), sparse_loss_(alone_NV, few, spec)
    gap_N = (terms.divergence_N[picked_N] - alone.divergence_N).abs()
    gap_NV = (logits_NV[picked_N].float() - alone_NV.float()).abs()
    return [
        at_most("divergence_gap", float(gap_N.amax()), 1e-4),
        at_most("gradient_gap", float(gap_NV.amax()), 1e-6),
    ]


def over_matmuls(place: Place) -> list[Figure]:
    """Time the fused head over its three matrix products, both in this machine's way."""
    device = place.device
    if device == "cuda":
        rows, width, vocab, valid, dtype = 8192, 2048, 151_936, ODD, torch.bfloat16
    else:
        rows, width, vocab, valid, dtype = 256, 576, 8192, 8001, torch.float32
    draw = torch.Generator(device).manual_seed(0)
    hidden_ND, weight_VD = (
        (torch.randn(count, width, generator=draw, device=device) / width**0.25).to(dtype)
        for count in (rows, vocab)
    )
    leaves = (hidden_ND.requires_grad_(), weight_VD.requires_grad_())
    figures = []
    for name, sampled in (("top64", False), ("sampled", True)):
        targets = draw_targets(rows, valid, device, sampled=sampled)
        spec = FusedSpec(LossSpec(2.0, 0.5), chunk_rows=_chunk_rows(rows), valid_vocab=valid)

        def step(targets: HeadTargets = targets, spec: FusedSpec = spec) -> None:
            loss = fused_head_loss(*leaves, None, targets, spec=spec).loss
            torch.autograd.grad(loss, leaves)

        ratio = ratio_of(step, _matmuls(hidden_ND.detach(), weight_VD.detach()), device)
        # The limit is the goal on a GPU with room for noise; a CPU's tiny shape is only run.
        figures.append(
            at_most(f"loss_over_matmuls_{name}", ratio, 1.5)
            if device == "cuda"
            else Figure(f"loss_over_matmuls_{name}", ratio)
        )
    return figures


def _chunk_rows(rows: int) -> int:
    return min(rows, 4096)


def _matmuls(hidden_ND: Tensor, weight_VD: Tensor) -> Callable[[], None]:
    logits_NV = hidden_ND @ weight_VD.T
    grad_ND, grad_VD = torch.empty_like(hidden_ND), torch.empty_like(weight_VD)

    def step() -> None:
        torch.mm(hidden_ND, weight_VD.T, out=logits_NV)
        torch.mm(logits_NV, weight_VD, out=grad_ND)
        torch.mm(logits_NV.T, hidden_ND, out=grad_VD)

    return step


def ratio_of(
    step: Callable[[], None], baseline: Callable[[], None], device: str, *, rounds: int = 7
) -> float:
    """Return the median over rounds of the time of `step` over that of `baseline`, in turn."""

    def seconds(call: Callable[[], None]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for call in (step, baseline):
        seconds(call)
    return statistics.median(seconds(step) / seconds(baseline) for _ in range(rounds))
