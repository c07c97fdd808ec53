"""Sampled targets: unbiased in value and gradient, for any control variate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.loss import reference
from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.sampled_divergence import default_share, dither_bias, row_share
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from pipeline.sampling.inclusion import InclusionRule

Draw = Callable[..., HeadTargets]

V = 40
T1 = InclusionRule((1.0, 2.0), (1 / 6, 0.0))
T2 = InclusionRule((1.0, 2.0), (0.0, 1 / 10))
BOTH = InclusionRule((1.0, 2.0), (1 / 5, 1 / 8))
ESTIMABLE = ("forward_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl")


def case(seed: int) -> tuple[Tensor, Tensor]:
    """Return a teacher's log p [V] and a student's logits [V]: near, but not the same."""
    generator = torch.Generator().manual_seed(seed)
    z_V = torch.randn(V, generator=generator, dtype=torch.float64) * 2
    student_V = 0.8 * z_V + torch.randn(V, generator=generator, dtype=torch.float64)
    return torch.log_softmax(z_V, -1), student_V


def truth(log_p_V: Tensor, student_U: Tensor, spec: LossSpec) -> tuple[float, Tensor]:
    """Return D over the student's U tokens and its gradient on their logits."""
    logits_U = student_U.clone().requires_grad_()
    p_V = torch.softmax(log_p_V / spec.temperature, -1)
    q_U = torch.softmax(logits_U / spec.temperature, -1)
    value = reference.outcome(spec, p_V[: len(student_U)], q_U).sum()
    (spec.temperature**2 * value).backward()
    assert logits_U.grad is not None
    return value.item(), logits_U.grad


def estimates(
    draw: Draw, rule: InclusionRule, spec: LossSpec, *, draws: int, seed: int, vocab: int = V
) -> tuple[Tensor, Tensor]:
    """Return value [R] and gradient [R, U] of each sample, minus the exact ones."""
    log_p_V, student_V = case(seed)
    student_U = student_V[:vocab]
    p_V = torch.softmax(log_p_V / spec.temperature, -1)
    targets = draw(log_p_V.numpy(), rule, temperature=spec.temperature, draws=draws, seed=seed)
    targets = targets._replace(entropy_N=torch.special.entr(p_V).sum().expand(draws))
    grad_RU = student_U.repeat(draws, 1)
    terms = sparse_loss_(grad_RU, targets, spec)
    value, gradient_U = truth(log_p_V, student_U, spec)
    return terms.divergence_N - value, grad_RU - gradient_U


def assert_mean_is_zero(errors_R: Tensor) -> None:
    """Fail if a mean is more than five standard errors from zero, in any component.

    The second term is Bernstein's, for tokens that are expected to be sampled once or twice.
    """
    mean, error = errors_R.mean(0), errors_R.std(0) / len(errors_R) ** 0.5
    assert (mean.abs() <= 5 * error + 5 / len(errors_R)).all(), (mean / error).abs().max()


@pytest.mark.parametrize("share", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("divergence", ESTIMABLE)
@pytest.mark.parametrize(("temperature", "rule"), [(1.0, BOTH), (2.0, BOTH), (1.0, T2), (2.0, T2)])
def test_unbiased_whatever_the_control_variate(
    draw_targets: Draw,
    temperature: float,
    rule: InclusionRule,
    divergence: str,
    share: float | None,
) -> None:
    """Value and gradient, at temperatures that the rule covers and at one it does not."""
    spec = LossSpec(temperature, 1.0, "auto", divergence, control_variate=share)  # type: ignore[arg-type]
    for seed in (0, 1):
        for errors_R in estimates(draw_targets, rule, spec, draws=10_000, seed=seed):
            assert_mean_is_zero(errors_R)


@pytest.mark.parametrize("tail", ["auto", "zero"])
@pytest.mark.parametrize("vocab", [V, 30])
@pytest.mark.parametrize(
    ("temperature", "rule"), [(1.0, T1), (1.0, BOTH), (2.0, BOTH), (1.0, T2), (2.0, T2)]
)
def test_unbiased_though_log_p_is_rounded(
    draw_targets: Draw, temperature: float, rule: InclusionRule, vocab: int, tail: str
) -> None:
    """With dither the means of p and of p log p are off by known factors."""
    spec = LossSpec(temperature, 1.0, tail, sampled_log_step=1.0)  # type: ignore[arg-type]
    draw = partial(draw_targets, log_step=1.0)
    for seed in (0, 1):
        for errors_R in estimates(draw, rule, spec, draws=20_000, seed=seed, vocab=vocab):
            assert_mean_is_zero(errors_R)


def test_the_dither_is_seen_where_it_is_forgotten(draw_targets: Draw) -> None:
    """The test above can fail: without the factors the mean is off."""
    draw = partial(draw_targets, log_step=1.0)
    for errors_R in estimates(draw, T1, LossSpec(1.0, 1.0), draws=20_000, seed=0):
        with pytest.raises(AssertionError):
            assert_mean_is_zero(errors_R)


def test_the_factors_of_the_dither() -> None:
    """By numerical integration."""
    for step, temperature in ((1.0, 1.0), (1.0, 2.0), (0.25, 0.5)):
        half = step / (2 * temperature)
        u = (np.arange(100_000) + 0.5) / 50_000 * half - half
        mean = np.exp(u).mean()
        found = dither_bias(step, temperature)
        assert found == pytest.approx((np.log(mean), (u * np.exp(u)).mean() / mean - np.log(mean)))
    assert dither_bias(0.0, 1.0) == (0.0, 0.0)


@pytest.mark.parametrize("divergence", ESTIMABLE)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_unbiased_over_a_smaller_vocabulary(
    draw_targets: Draw, temperature: float, divergence: str
) -> None:
    """Mass of ids outside the student's vocabulary does not affect any logit."""
    spec = LossSpec(temperature, 1.0, "auto", divergence)  # type: ignore[arg-type]
    for seed in (0, 1):
        for errors_R in estimates(draw_targets, BOTH, spec, draws=10_000, seed=seed, vocab=30):
            assert_mean_is_zero(errors_R)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("part", ["value", "gradient"])
def test_error_falls_with_the_root_of_the_tokens(
    draw_targets: Draw, temperature: float, part: str
) -> None:
    """With sixteen times as many samples the error is a quarter; a bias would remain."""
    spec = LossSpec(temperature, 1.0)
    errors_R = estimates(draw_targets, BOTH, spec, draws=64_000, seed=3)[part == "gradient"]
    errors_RX = errors_R.reshape(len(errors_R), -1)

    def root_mean_square(size: int) -> float:
        return float(errors_RX.unflatten(0, (-1, size)).mean(1).square().mean().sqrt())

    assert root_mean_square(400) / root_mean_square(25) == pytest.approx(1 / 4, rel=0.2)
    assert root_mean_square(25) / root_mean_square(1) == pytest.approx(1 / 5, rel=0.1)


def test_the_default_share_is_quieter_than_none(draw_targets: Draw) -> None:
    """The control variate reduces the gradient's variance, and the value's."""
    assert [default_share(t) for t in (0.5, 1.0, 2.0)] == pytest.approx([0.0, 0.34, 0.74])
    assert [default_share(1.0, 2.0), default_share(1.0, 9.0)] == pytest.approx([0.46, 0.46])
    assert default_share(10.0) == 1.0
    apart_N = torch.tensor([-0.1, 0.0, 0.1, 10.0])
    shares_N = row_share(apart_N, torch.zeros(4), 2.0)
    assert shares_N.tolist() == pytest.approx([0.74, 0.74, 0.74 / 1.2, 0.74 / 21])
    shares_N = row_share(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 8.0]), 1.0)
    assert shares_N.tolist() == pytest.approx([0.34, 0.34 / 9, 0.34 / 18])

    def noise(temperature: float, tail: str) -> tuple[float, float]:
        spec = LossSpec(temperature, 1.0, tail)  # type: ignore[arg-type]
        value_R, grad_RV = estimates(draw_targets, T2, spec, draws=4000, seed=1)
        return float(value_R.std()), float(grad_RV.norm())

    for temperature, factor in ((1.0, 0.95), (2.0, 0.8)):
        for with_it, without in zip(
            noise(temperature, "control_variate"), noise(temperature, "zero"), strict=True
        ):
            assert with_it < factor * without


def test_without_a_draw_and_share_one_it_is_the_bucket() -> None:
    """The control variate is the bucket's tail; nothing sampled, nothing corrects it."""
    log_p_V, student_V = case(5)
    ids = log_p_V.topk(6).indices.sort().values
    always_kept = HeadTargets(
        ids_NK=ids[None],
        logprobs_NK=log_p_V[ids][None],
        inclusion_NK=None,
        log_z_N=torch.logsumexp(log_p_V / 2, -1)[None],
        entropy_N=torch.zeros(1),
        label_N=torch.zeros(1, dtype=torch.int64),
    )
    sampled = always_kept._replace(inclusion_NK=torch.ones(1, 6))
    for divergence in ESTIMABLE:
        a, b = student_V[None].clone(), student_V[None].clone()
        bucket = LossSpec(2.0, 1.0, "auto", divergence)  # type: ignore[arg-type]
        variate = LossSpec(2.0, 1.0, "auto", divergence, control_variate=1.0)  # type: ignore[arg-type]
        terms_a = sparse_loss_(a, always_kept, bucket)
        terms_b = sparse_loss_(b, sampled, variate)
        torch.testing.assert_close(terms_a.divergence_N, terms_b.divergence_N)
        torch.testing.assert_close(a, b)


def test_policies_in_force() -> None:
    """What `auto` means for each divergence and kind of target."""
    auto = {
        (name, sampled): LossSpec(1.0, 1.0, "auto", name).tail_for(sampled=sampled)  # type: ignore[arg-type]
        for name in (*ESTIMABLE, "reverse_kl")
        for sampled in (False, True)
    }
    variate = {key for key, tail in auto.items() if tail == "control_variate"}
    assert variate == {(name, True) for name in ESTIMABLE}
    assert {tail for key, tail in auto.items() if key not in variate} == {"bucket"}
    assert LossSpec(1.0, 1.0, "control_variate").tail_for(sampled=False) == "bucket"
    measured = LossSpec(2.0, 0.3, "zero", "skew_kl", control_variate=None).for_measuring(1.0)
    assert (measured.tail, measured.divergence, measured.temperature) == ("auto", "forward_kl", 1.0)


def test_bucket_joins_the_sampled_to_the_rest(draw_targets: Draw) -> None:
    """Every sample then gives the same result, that of the always-kept entries alone."""
    spec = LossSpec(2.0, 1.0, "bucket", "reverse_kl")
    values_R, grad_RV = estimates(draw_targets, BOTH, spec, draws=50, seed=0)
    torch.testing.assert_close(values_R, values_R[:1].expand(50))
    torch.testing.assert_close(grad_RV, grad_RV[:1].expand(50, -1))
    assert values_R[0] < 0, "merging outcomes loses divergence"


def test_extremes_stay_finite() -> None:
    """A tail of nearly no student mass, a one-hot teacher, masses above 1, float32."""
    logits_NV = torch.randn(4, V, generator=torch.Generator().manual_seed(0)) * 3
    logits_NV[0, :5] = 300.0
    ids_NK = torch.arange(6).expand(4, 6).contiguous()
    logprobs_NK = torch.full((4, 6), -3.0)
    logprobs_NK[1] = torch.tensor([0.0, -50, -50, -50, -80, -90])
    logprobs_NK[2] = -1.0
    inclusion_NK = torch.tensor([1.0, 1, 1, 0.5, 1e-3, 1e-3]).expand(4, 6).contiguous()
    inclusion_NK[3] = 1e-4
    targets = HeadTargets(
        ids_NK, logprobs_NK, inclusion_NK, torch.zeros(4), torch.ones(4), torch.arange(4)
    )
    for divergence in ESTIMABLE:
        for share in (None, 0.0, 1.0):
            spec = LossSpec(1.0, 0.5, "auto", divergence, control_variate=share)  # type: ignore[arg-type]
            grad_NV = logits_NV.clone()
            terms = sparse_loss_(grad_NV, targets, spec)
            assert torch.isfinite(terms.divergence_N).all()
            assert torch.isfinite(grad_NV).all()
            scale = np.maximum(1.0, float(grad_NV.abs().max()))
            assert grad_NV.sum(-1).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("divergence", ESTIMABLE)
def test_no_tail_where_the_always_kept_are_the_whole_vocabulary(
    divergence: str, share: float
) -> None:
    """Quantised masses sum to 0.95, but there is no other token to have the rest."""
    ids_NK = torch.arange(4).expand(3, 4).contiguous()
    p_K = torch.tensor([0.4, 0.3, 0.15, 0.1])
    logprobs_NK = p_K.log().expand(3, 4).contiguous()
    targets = HeadTargets(
        ids_NK, logprobs_NK, torch.ones(3, 4), torch.zeros(3), torch.ones(3), torch.arange(3)
    )
    spec = LossSpec(1.0, 1.0, "control_variate", divergence, control_variate=share)  # type: ignore[arg-type]
    logits_NV = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    terms = sparse_loss_(logits_NV.clone(), targets, spec)
    q_NV = torch.softmax(logits_NV, -1)
    wanted_N = reference.outcome(spec, p_K.double(), q_NV).sum(-1)
    torch.testing.assert_close(terms.divergence_N, wanted_N, atol=1e-6, rtol=1e-6)
    leaf_NV = logits_NV.clone().requires_grad_()
    reference.outcome(spec, p_K.double(), torch.softmax(leaf_NV, -1)).sum().backward()
    grad_NV = logits_NV.clone()
    sparse_loss_(grad_NV, targets, spec)
    torch.testing.assert_close(grad_NV, leaf_NV.grad, atol=1e-6, rtol=1e-6)
