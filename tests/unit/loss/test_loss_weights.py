"""Weights of tokens, top-k rows among sampled ones, several teachers, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.loss.fused import FusedSpec, fused_head_loss
from pipeline.loss.logits import logits_loss
from pipeline.loss.reference import loss_sum
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets

MakeTargets = Callable[..., tuple[HeadTargets, Tensor]]
N, V, D = 7, 30, 5


def layer(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    def random(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).requires_grad_()

    return random(N, D), random(V, D), random(V)


def gradients(loss: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_gradients_of_a_weighted_loss(
    make_targets: MakeTargets,
    generator: torch.Generator,
    sampled: bool,
    dtype: torch.dtype,
    chunk_rows: int,
) -> None:
    targets, _ = make_targets(generator, tokens=N, vocab=V, temperature=2.0, inclusion=sampled)
    weight_N = torch.tensor([0.0, 0.3, 2.5, 1.0, 0.0, 1.7, 1.5])
    targets = targets._replace(weight_N=weight_N)
    # A constant share: it is no function of the student, so that the reference differentiates it.
    spec = LossSpec(2.0, 0.6, control_variate=0.0 if sampled else None)
    inputs = layer(generator, dtype)
    terms = fused_head_loss(*inputs, targets, spec=FusedSpec(spec, chunk_rows))
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    hidden_ND, weight_VD, bias_V = exact
    wanted = loss_sum(hidden_ND @ weight_VD.t() + bias_V, targets, spec)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    assert float(terms.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    found = gradients(terms.loss, inputs)
    for a, b in zip(found, gradients(wanted, exact), strict=True):
        assert float((a - b).norm() / b.norm()) < max(tolerance, 1e-6)
    assert not found[0][0].any()  # a token of weight 0 has no gradient


def test_weights_of_logits(make_targets: MakeTargets, generator: torch.Generator) -> None:
    targets, _ = make_targets(generator, tokens=N, vocab=V)
    targets = targets._replace(weight_N=torch.rand(N, generator=generator))
    spec = LossSpec(1.0, 0.5)
    logits_NV = torch.randn(N, V, generator=generator, dtype=torch.float64, requires_grad=True)
    terms = logits_loss(logits_NV, targets, spec=spec)
    wanted = loss_sum(logits_NV, targets, spec)
    assert float(terms.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    (found,), (exact,) = gradients(terms.loss, (logits_NV,)), gradients(wanted, (logits_NV,))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", "skew_kl"])
def test_rows_of_a_top_k_among_sampled_ones(
    make_targets: MakeTargets, generator: torch.Generator, divergence: str
) -> None:
    """A top-k row has the loss of its tail bucket, a sampled one its estimate."""
    sampled, _ = make_targets(generator, tokens=N, vocab=V, inclusion=True)
    assert sampled.inclusion_NK is not None
    top_k_N = torch.tensor([n % 2 == 0 for n in range(N)])
    sampled.ids_NK[4, 1] = V + 3  # outside the student's vocabulary
    inclusion_NK = sampled.inclusion_NK.masked_fill(top_k_N[:, None], 1.0)
    mixed = sampled._replace(inclusion_NK=inclusion_NK, top_k_N=top_k_N)
    spec = LossSpec(1.0, 1.0, divergence=divergence)  # type: ignore[arg-type]
    logits_NV = torch.randn(N, V, generator=generator, dtype=torch.float64, requires_grad=True)
    for rows, alone in (
        (top_k_N, sampled._replace(inclusion_NK=None)),
        (~top_k_N, sampled),
    ):
        whole = logits_loss(logits_NV, mixed._replace(weight_N=rows.float()), spec=spec)
        wanted = logits_loss(logits_NV, alone._replace(weight_N=rows.float()), spec=spec)
        torch.testing.assert_close(whole.divergence_N[rows], wanted.divergence_N[rows])
        torch.testing.assert_close(
            gradients(whole.loss, (logits_NV,)), gradients(wanted.loss, (logits_NV,))
        )
        by_definition = loss_sum(logits_NV, mixed._replace(weight_N=rows.float()), spec)
        assert float(whole.loss.detach()) == pytest.approx(float(by_definition.detach()), rel=1e-6)


def test_repeated_positions_are_the_mean_teacher(
    make_targets: MakeTargets, generator: torch.Generator
) -> None:
    """With all entries kept, two teachers' targets with their shares give the mean's gradient."""
    weights = (0.7, 0.3)
    taught = [make_targets(generator, tokens=N, vocab=V, counts=[V] * N) for _ in weights]
    label_N = taught[0][0].label_N
    both = HeadTargets(
        *(
            None if parts[0] is None else torch.cat(parts)
            for parts in zip(*(t._replace(label_N=label_N) for t, _ in taught), strict=True)
        )  # type: ignore[arg-type]
    )._replace(weight_N=torch.tensor(weights).repeat_interleave(N))
    logits_NV = torch.randn(N, V, generator=generator, dtype=torch.float64, requires_grad=True)
    spec = LossSpec(1.0, 0.6)
    found = gradients(logits_loss(logits_NV.repeat(2, 1), both, spec=spec).loss, (logits_NV,))[0]
    mean_NV = sum(w * p_NV.exp() for w, (_, p_NV) in zip(weights, taught, strict=True))
    cross = -(mean_NV * torch.log_softmax(logits_NV, -1)).sum()
    label = torch.nn.functional.cross_entropy(logits_NV, label_N, reduction="sum")
    wanted = gradients(0.6 * cross + 0.4 * label, (logits_NV,))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
