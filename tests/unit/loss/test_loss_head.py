"""The fused head: gradients of weight, bias and hidden states, chunks, precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pipeline.loss.fused import FusedSpec, fused_head_loss
from pipeline.loss.spec import LossSpec
from tests.unit.loss.dense_head import SPEC, MakeTargets, N, V, dense, inputs


@pytest.mark.parametrize("chunk_rows", [1, 7, N, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_dense(
    make_targets: MakeTargets,
    generator: torch.Generator,
    chunk_rows: int,
    temperature: float,
    softcap: float | None,
    with_bias: bool,
) -> None:
    """Loss and all gradients, for any chunk size."""
    targets, _ = make_targets(generator, tokens=N, vocab=V, temperature=temperature)
    hidden, weight, bias = inputs(generator)
    spec = FusedSpec(LossSpec(temperature, 0.4), chunk_rows, softcap=softcap)
    used_bias = bias if with_bias else None
    terms = fused_head_loss(hidden, weight, used_bias, targets, spec=spec)
    (terms.loss * 0.25).backward()
    loss, *gradients = dense(hidden, weight, used_bias, targets, spec)
    torch.testing.assert_close(terms.loss.detach(), loss)
    for tensor, gradient in zip((hidden, weight, bias), gradients, strict=False):
        torch.testing.assert_close(tensor.grad, gradient * 0.25)
    with torch.no_grad():
        values = fused_head_loss(hidden, weight, used_bias, targets, spec=spec)
    assert torch.equal(values.loss, terms.loss.detach())


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_precision(
    make_targets: MakeTargets, generator: torch.Generator, dtype: torch.dtype, rtol: float
) -> None:
    """Whole-gradient error against float64 on the same rounded inputs."""
    targets, _ = make_targets(generator, tokens=N, vocab=V, temperature=2.0)
    hidden, weight, bias = inputs(generator, dtype)
    terms = fused_head_loss(hidden, weight, bias, targets, spec=SPEC)
    assert terms.loss.dtype == torch.float32
    terms.loss.backward()
    loss, *gradients = dense(hidden, weight, bias, targets, SPEC)
    torch.testing.assert_close(terms.loss.detach().double(), loss, rtol=rtol, atol=0)
    for tensor, gradient in zip((hidden, weight, bias), gradients, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == dtype
        error = (tensor.grad.double() - gradient).norm() / gradient.norm()
        assert error < rtol


def test_padded_vocabulary(make_targets: MakeTargets, generator: torch.Generator) -> None:
    """Rows past the vocabulary have no mass and a gradient of exactly zero."""
    targets, _ = make_targets(generator, tokens=N, vocab=19, temperature=2.0)
    hidden, weight, bias = inputs(generator)
    spec = replace(SPEC, valid_vocab=19)
    fused_head_loss(hidden, weight, bias, targets, spec=spec).loss.backward()
    _, *gradients = dense(hidden, weight, bias, targets, spec)
    for tensor, gradient in zip((hidden, weight, bias), gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)
    assert weight.grad is not None
    assert bias.grad is not None
    assert not weight.grad[19:].any()
    assert not bias.grad[19:].any()


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_input_costs_and_gets_nothing(
    make_targets: MakeTargets, generator: torch.Generator, frozen: int
) -> None:
    """The gradient of what still trains does not change."""
    targets, _ = make_targets(generator, tokens=N, vocab=V, temperature=2.0)
    leaves = inputs(generator)[:2]
    leaves[frozen].requires_grad_(False)
    fused_head_loss(*leaves, None, targets, spec=SPEC).loss.backward()
    _, *gradients = dense(*leaves, None, targets, SPEC)
    assert leaves[frozen].grad is None
    torch.testing.assert_close(leaves[1 - frozen].grad, gradients[1 - frozen])


def test_no_tokens(make_targets: MakeTargets, generator: torch.Generator) -> None:
    """N = 0 takes part in backward with zeros, so that a rank without tokens keeps in step."""
    targets, _ = make_targets(generator, tokens=0, vocab=V)
    hidden, weight, bias = inputs(generator)
    terms = fused_head_loss(hidden[:0], weight, bias, targets, spec=SPEC)
    assert terms.loss.item() == 0
    assert terms.divergence_N.shape == (0,)
    terms.loss.backward()
    for tensor in (hidden, weight, bias):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_second_backward_is_refused(make_targets: MakeTargets, generator: torch.Generator) -> None:
    """The gradient is consumed by one pass; a second pass must not be silently wrong."""
    targets, _ = make_targets(generator, tokens=N, vocab=V)
    hidden, weight, _ = inputs(generator)
    loss = fused_head_loss(hidden, weight, None, targets, spec=SPEC).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()
    loss = fused_head_loss(hidden, weight, None, targets, spec=SPEC).loss
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_activation_checkpoint(
    make_targets: MakeTargets, generator: torch.Generator, reentrant: bool
) -> None:
    """Inefficient, but correct."""
    targets, _ = make_targets(generator, tokens=N, vocab=V, temperature=2.0)
    hidden, weight, _ = inputs(generator)

    def inner(h: Tensor) -> Tensor:
        return fused_head_loss(torch.sin(h), weight, None, targets, spec=SPEC).loss

    loss = checkpoint(inner, hidden, use_reentrant=reentrant)
    loss.backward()
    got = hidden.grad
    hidden.grad = None
    inner(hidden).backward()
    torch.testing.assert_close(got, hidden.grad)


def test_no_array_of_tokens_times_vocabulary(
    make_targets: MakeTargets, generator: torch.Generator
) -> None:
    """No operation's result is larger than a chunk of logits or the weight itself."""
    tokens, vocab, chunk = 64, 300, 4
    targets, _ = make_targets(generator, tokens=tokens, vocab=vocab, temperature=0.7)
    hidden = torch.randn(tokens, 2, requires_grad=True)
    weight = torch.randn(vocab, 2, requires_grad=True)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for item in out if isinstance(out, tuple | list) else (out,):
                if isinstance(item, Tensor):
                    largest = max(largest, item.numel())
            return out

    with Watch():
        spec = replace(SPEC, chunk_rows=chunk)
        fused_head_loss(hidden, weight, None, targets, spec=spec).loss.backward()
    assert largest <= chunk * vocab
