"""ULD: against its paper's definition, its reference in float64, and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.loss.fused import FusedSpec, fused_head_loss
from pipeline.loss.reference import loss_sum, sorted_distance, sparse_divergence
from pipeline.loss.settings import LossSettings
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from pipeline.loss.uld import uld_loss_

MakeTargets = Callable[..., tuple[HeadTargets, Tensor]]


def spec(alpha: float = 0.5) -> LossSpec:
    return LossSpec(1.0, alpha, cross_tokenizer="uld")


def both(
    logits_NV: Tensor, targets: HeadTargets, alpha: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return value and gradient of the loss, ours and the reference's."""
    wanted_NV = logits_NV.double().clone().requires_grad_()
    wanted = loss_sum(wanted_NV, targets, spec(alpha))
    wanted.backward()
    found_NV = logits_NV.clone()
    terms = uld_loss_(found_NV, targets, spec(alpha))
    found = alpha * terms.divergence_N.sum() + (1 - alpha) * terms.ce_N.sum()
    assert wanted_NV.grad is not None
    return (found, found_NV), (wanted.detach(), wanted_NV.grad)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("teacher_vocab", [40, 23, 90])
def test_matches_reference(
    alpha: float, teacher_vocab: int, make_targets: MakeTargets, generator: torch.Generator
) -> None:
    targets, _ = make_targets(generator, tokens=9, vocab=teacher_vocab)
    targets = targets._replace(label_N=targets.label_N % 40)
    logits_NV = torch.randn(9, 40, generator=generator, dtype=torch.float64) * 2
    (value, grad_NV), (wanted, wanted_NV) = both(logits_NV, targets, alpha)
    assert torch.allclose(value, wanted, rtol=1e-12)
    assert torch.allclose(grad_NV, wanted_NV, atol=1e-12)
    assert float(grad_NV.sum(-1).abs().max()) < 1e-12, "softmax is invariant to a shift"


def test_gradient_by_finite_differences(
    make_targets: MakeTargets, generator: torch.Generator
) -> None:
    targets, _ = make_targets(generator, tokens=4, vocab=11, counts=[3, 1, 0, 5])
    logits_NV = torch.randn(4, 11, generator=generator, dtype=torch.float64)
    gradient_NV = logits_NV.clone()
    uld_loss_(gradient_NV, targets, spec(0.7))
    for n in range(4):
        for v in range(11):
            values = []
            for step in (1e-6, -1e-6):
                moved_NV = logits_NV.clone()
                moved_NV[n, v] += step
                terms = uld_loss_(moved_NV, targets, spec(0.7), gradient=False)
                values.append(float(0.7 * terms.divergence_N.sum() + 0.3 * terms.ce_N.sum()))
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(
                float(gradient_NV[n, v]), abs=1e-8
            )


def test_with_all_entries_it_is_the_papers(
    make_targets: MakeTargets, generator: torch.Generator
) -> None:
    targets, logprobs_NV = make_targets(generator, tokens=6, vocab=30, counts=[30] * 6)
    logits_NV = torch.randn(6, 30, generator=generator, dtype=torch.float64)
    exact_N = sorted_distance(logits_NV, logprobs_NV.exp())
    terms = uld_loss_(logits_NV.clone(), targets, spec())
    assert torch.allclose(terms.divergence_N, exact_N, atol=1e-6)  # targets are float32
    # The ids of the tokens do not matter.
    order = torch.randperm(30, generator=generator)
    again = uld_loss_(logits_NV[:, order].clone(), targets, spec())
    assert torch.allclose(again.divergence_N, terms.divergence_N)


def test_fewer_entries_are_a_lower_bound(
    make_targets: MakeTargets, generator: torch.Generator
) -> None:
    before_N = None
    logits_NV = torch.randn(5, 50, generator=generator, dtype=torch.float64)
    state = generator.get_state()
    for count in (1, 5, 20, 50):
        generator.set_state(state)
        targets, logprobs_NV = make_targets(generator, tokens=5, vocab=50, counts=[count] * 5)
        value_N = uld_loss_(logits_NV.clone(), targets, spec()).divergence_N
        assert (value_N <= sorted_distance(logits_NV, logprobs_NV.exp()) + 1e-6).all()
        if before_N is not None:
            assert (value_N >= before_N - 1e-6).all(), "each known rank adds"
        before_N = value_N
    assert (value_N > 0).all()
    assert (value_N <= 2).all()


def test_a_token_without_entries_has_cross_entropy_alone(
    make_targets: MakeTargets, generator: torch.Generator
) -> None:
    targets, _ = make_targets(generator, tokens=3, vocab=20, counts=[0, 4, 0])
    logits_NV = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    gradient_NV = logits_NV.clone()
    terms = uld_loss_(gradient_NV, targets, spec(0.5))
    assert terms.divergence_N[[0, 2]].tolist() == [0.0, 0.0]
    q_NV = torch.softmax(logits_NV, -1)
    wanted_NV = 0.5 * (q_NV - torch.nn.functional.one_hot(targets.label_N, 20))
    assert torch.allclose(gradient_NV[[0, 2]], wanted_NV[[0, 2]])
    assert not torch.allclose(gradient_NV[1], wanted_NV[1])


def test_no_tokens_and_no_entries_at_all(make_targets: MakeTargets) -> None:
    generator = torch.Generator().manual_seed(0)
    targets, _ = make_targets(generator, tokens=0, vocab=7)
    assert uld_loss_(torch.zeros(0, 7), targets, spec()).divergence_N.shape == (0,)
    targets, _ = make_targets(generator, tokens=2, vocab=7, counts=[0, 0])
    assert uld_loss_(
        torch.randn(2, 7), targets, spec(), predictions=True
    ).divergence_N.tolist() == [0, 0]


def test_predictions_and_blocks(
    make_targets: MakeTargets, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, _ = make_targets(generator, tokens=7, vocab=30)
    logits_NV = torch.randn(7, 30, generator=generator)
    one_NV, two_NV = logits_NV.clone(), logits_NV.clone()
    one = uld_loss_(one_NV, targets, spec(), predictions=True)
    monkeypatch.setattr("pipeline.loss.uld._BLOCK_BYTES", 2 * 4 * 30)
    two = uld_loss_(two_NV, targets, spec(), predictions=True)
    assert torch.equal(one_NV, two_NV)
    assert one.acceptance_N is None
    for a, b in zip(one[:4], two[:4], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
    logprobs_NV = torch.log_softmax(logits_NV, -1)
    assert torch.equal(one.argmax_N, logits_NV.argmax(-1))
    assert torch.allclose(one.argmax_logprob_N, logprobs_NV.max(-1).values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_through_the_head(
    dtype: torch.dtype, make_targets: MakeTargets, generator: torch.Generator
) -> None:
    targets, _ = make_targets(generator, tokens=10, vocab=64)
    targets = targets._replace(label_N=targets.label_N % 33)
    hidden_ND = torch.randn(10, 8, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(40, 8, generator=generator).to(dtype).requires_grad_()
    # Rows from 33 on are padding.
    fused = FusedSpec(spec(0.6), chunk_rows=4, valid_vocab=33)
    fused_head_loss(hidden_ND, weight_VD, None, targets, spec=fused).loss.backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_ND, weight_VD)]
    loss_sum(wide[0] @ wide[1][:33].T, targets, spec(0.6)).backward()
    for found, wanted in zip((hidden_ND, weight_VD), wide, strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        error = (found.grad.double() - wanted.grad).norm() / wanted.grad.norm()
        assert float(error) < (1e-5 if dtype == torch.float32 else 5e-2)
    assert weight_VD.grad is not None
    assert not weight_VD.grad[33:].any()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    vocab=st.integers(1, 14),
    spread=st.floats(0.0, 40.0),
)
def test_any_ragged_targets(
    seed: int, counts: list[int], vocab: int, spread: float, make_targets: MakeTargets
) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets, _ = make_targets(generator, tokens=len(counts), vocab=12, counts=counts, peak=spread)
    targets = targets._replace(label_N=targets.label_N % vocab)
    logits_NV = torch.randn(len(counts), vocab, generator=generator, dtype=torch.float64) * 3
    values_N = sparse_divergence(logits_NV, targets, spec())
    (value, grad_NV), (wanted, wanted_NV) = both(logits_NV, targets, 0.5)
    assert torch.isfinite(grad_NV).all()
    assert ((values_N >= 0) & (values_N <= 2 + 1e-9)).all()
    assert torch.allclose(value, wanted, rtol=1e-9, atol=1e-9)
    assert torch.allclose(grad_NV, wanted_NV, atol=1e-7)


def test_settings_that_it_cannot_take() -> None:
    for name, value in (("temperature", 2.0), ("divergence", "skew_kl"), ("tail", "zero")):
        data = {"cross_tokenizer": "uld", "temperature": 1.0, name: value}
        with pytest.raises(ValueError, match=rf"loss\.{name}: found .* with loss.cross_tokenizer"):
            LossSettings.model_validate(data)
    assert LossSettings.model_validate({"cross_tokenizer": "uld", "temperature": 1.0})
