"""The in-place chunk loss against the dense float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.loss import reference
from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets

MakeTargets = Callable[..., tuple[HeadTargets, Tensor]]
TAILS = ("bucket", "zero", "renormalise")
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl")


def expected(logits_NV: Tensor, targets: HeadTargets, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Return the reference's per-token divergence and its gradient on the logits, in float64."""
    dense = logits_NV.double().clone().requires_grad_()
    reference.loss_sum(dense, targets, spec).backward()
    assert dense.grad is not None
    return reference.sparse_divergence(dense.detach(), targets, spec), dense.grad


def check(
    logits_NV: Tensor, targets: HeadTargets, spec: LossSpec, *, atol: float, grad_atol: float
) -> None:
    """Compare values and gradient with the reference."""
    divergence_N, grad_NV = expected(logits_NV, targets, spec)
    ce_N = reference.cross_entropy(logits_NV, targets.label_N)
    buffer = logits_NV.clone()
    terms = sparse_loss_(buffer, targets, spec)
    torch.testing.assert_close(terms.divergence_N.double(), divergence_N, atol=atol, rtol=1e-5)
    torch.testing.assert_close(terms.ce_N.double(), ce_N, atol=atol, rtol=1e-5)
    torch.testing.assert_close(buffer.double(), grad_NV, atol=grad_atol, rtol=1e-5)
    values = sparse_loss_(logits_NV.clone(), targets, spec, gradient=False)
    assert torch.equal(values.divergence_N, terms.divergence_N)
    assert torch.equal(values.ce_N, terms.ce_N)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("inclusion", [False, True])
def test_matches_reference(
    make_targets: MakeTargets,
    generator: torch.Generator,
    tail: str,
    temperature: float,
    alpha: float,
    inclusion: bool,
) -> None:
    """Value and gradient, for every policy, temperature and mixture, ragged with padding."""
    targets, _ = make_targets(
        generator, tokens=9, vocab=37, temperature=temperature, inclusion=inclusion
    )
    logits_NV = torch.randn(9, 37, generator=generator, dtype=torch.float64) * 3
    spec = LossSpec(temperature, alpha, tail)  # type: ignore[arg-type]
    check(logits_NV, targets, spec, atol=1e-9, grad_atol=1e-9)
    check(logits_NV.float(), targets, spec, atol=2e-5, grad_atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits(
    make_targets: MakeTargets, generator: torch.Generator, dtype: torch.dtype
) -> None:
    """Reductions are in float32: only the stored gradient is rounded."""
    targets, _ = make_targets(generator, tokens=6, vocab=50, temperature=2.0)
    logits_NV = (torch.randn(6, 50, generator=generator) * 3).to(dtype)
    spec = LossSpec(2.0, 0.5, "bucket")
    divergence_N, grad_NV = expected(logits_NV, targets, spec)
    buffer = logits_NV.clone()
    terms = sparse_loss_(buffer, targets, spec)
    assert terms.divergence_N.dtype == torch.float32
    torch.testing.assert_close(terms.divergence_N.double(), divergence_N, atol=2e-5, rtol=1e-5)
    assert buffer.dtype == dtype
    torch.testing.assert_close(buffer.double(), grad_NV, atol=1e-6, rtol=2**-8)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [2.0, 0.7])
def test_gradient_by_finite_differences(
    make_targets: MakeTargets,
    generator: torch.Generator,
    tail: str,
    divergence: str,
    temperature: float,
) -> None:
    """The gradient is that of the logged loss itself, T^2 included, not only the reference's."""
    if divergence == "reverse_kl":
        tail = "bucket"
    # With a control variate only the mean of the values has this gradient.
    always_kept = tail == "bucket"
    targets, _ = make_targets(
        generator, tokens=3, vocab=8, temperature=temperature, inclusion=not always_kept
    )
    logits_NV = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    spec = LossSpec(temperature, 0.3, tail, divergence)  # type: ignore[arg-type]

    def loss(z: Tensor) -> Tensor:
        terms = sparse_loss_(z.clone(), targets, spec, gradient=False)
        return 0.3 * temperature**2 * terms.divergence_N.sum() + 0.7 * terms.ce_N.sum()

    grad_NV = logits_NV.clone()
    sparse_loss_(grad_NV, targets, spec)
    step = 1e-6
    for n in range(3):
        for v in range(8):
            shift = torch.zeros_like(logits_NV)
            shift[n, v] = step
            slope = (loss(logits_NV + shift) - loss(logits_NV - shift)) / (2 * step)
            assert slope.item() == pytest.approx(grad_NV[n, v].item(), abs=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_entries_kept_is_the_dense_divergence(
    make_targets: MakeTargets,
    generator: torch.Generator,
    temperature: float,
    tail: str,
    divergence: str,
) -> None:
    """With K = V every policy is the full divergence, and its gradient that of the full one."""
    targets, logprobs_NV = make_targets(
        generator, tokens=5, vocab=16, counts=[16] * 5, temperature=temperature
    )
    logits_NV = torch.randn(5, 16, generator=generator)
    dense = logits_NV.double().clone().requires_grad_()
    spec = LossSpec(temperature, 1.0, tail, divergence)  # type: ignore[arg-type]
    divergence_N = reference.dense_divergence(dense, logprobs_NV, spec)
    (temperature**2 * divergence_N.sum()).backward()
    terms = sparse_loss_(logits_NV, targets, spec)
    torch.testing.assert_close(
        terms.divergence_N.double(), divergence_N.detach(), atol=2e-6, rtol=1e-5
    )
    torch.testing.assert_close(logits_NV.double(), dense.grad, atol=2e-6, rtol=1e-5)


def test_divergences_by_their_kin(make_targets: MakeTargets, generator: torch.Generator) -> None:
    """Limits and symmetry that follow from the definitions."""
    targets, _ = make_targets(generator, tokens=9, vocab=37)
    logits_NV = torch.randn(9, 37, generator=generator, dtype=torch.float64)

    def value(divergence: str, parameter: float = 0.5) -> Tensor:
        spec = LossSpec(
            1.0, 1.0, "bucket", divergence,  # type: ignore[arg-type]
            jsd_beta=parameter, skew_alpha=parameter,
        )  # fmt: skip
        return sparse_loss_(logits_NV.clone(), targets, spec, gradient=False).divergence_N

    small = 1e-6
    close = torch.testing.assert_close
    forward_N, reverse_N = value("forward_kl"), value("reverse_kl")
    close(value("jensen_shannon", small) / small, forward_N, rtol=1e-3, atol=1e-4)
    close(value("jensen_shannon", 1 - small) / small, reverse_N, rtol=1e-3, atol=1e-4)
    close(value("skew_kl", small), forward_N, rtol=1e-3, atol=1e-4)
    close(value("skew_reverse_kl", small), reverse_N, rtol=1e-3, atol=1e-4)
    halves_N = (value("skew_kl") + value("skew_reverse_kl")) / 2
    close(value("jensen_shannon"), halves_N)
    assert (value("jensen_shannon") <= torch.log(torch.tensor(2.0))).all()


def test_bucket_is_below_dense_kl_and_above_zero(
    make_targets: MakeTargets, generator: torch.Generator
) -> None:
    """Merging outcomes can only reduce a divergence (data processing inequality)."""
    targets, logprobs_NV = make_targets(generator, tokens=20, vocab=64, counts=[8] * 20)
    logits_NV = torch.randn(20, 64, generator=generator)
    full_N = reference.dense_kl(logits_NV, logprobs_NV, temperature=1.0)
    terms = sparse_loss_(logits_NV, targets, LossSpec(1.0, 1.0))
    assert (terms.divergence_N >= 0).all()
    assert (terms.divergence_N <= full_N + 1e-5).all()


@pytest.mark.parametrize("tail", TAILS)
def test_one_entry_and_all_mass_on_one_id(
    make_targets: MakeTargets, generator: torch.Generator, tail: str
) -> None:
    """K = 1, and a teacher that is always kept."""
    targets, _ = make_targets(generator, tokens=4, vocab=12, counts=[1] * 4)
    logits_NV = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    spec = LossSpec(1.0, 0.5, tail)  # type: ignore[arg-type]
    check(logits_NV, targets, spec, atol=1e-9, grad_atol=1e-9)
    always_kept = targets._replace(logprobs_NK=torch.zeros(4, 1), log_z_N=torch.zeros(4))
    check(logits_NV, always_kept, spec, atol=1e-9, grad_atol=1e-9)
    terms = sparse_loss_(logits_NV.clone(), always_kept, spec)
    log_q = torch.log_softmax(logits_NV, -1).gather(1, always_kept.ids_NK)[:, 0]
    torch.testing.assert_close(terms.divergence_N, -log_q)


def test_quantised_sum_above_one_is_scaled(
    make_targets: MakeTargets, generator: torch.Generator
) -> None:
    """Coarse values that sum to more than 1 leave no tail, and no negative weight."""
    targets, _ = make_targets(generator, tokens=4, vocab=30, counts=[6] * 4, peak=3.0)
    targets = targets._replace(logprobs_NK=targets.logprobs_NK + 0.1)
    logits_NV = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    check(logits_NV, targets, LossSpec(1.0, 1.0), atol=1e-9, grad_atol=1e-9)
    sparse_loss_(logits_NV, targets, LossSpec(1.0, 1.0))
    torch.testing.assert_close(logits_NV.sum(-1), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reverse_kl_of_a_quantised_sum_above_one_is_finite(
    make_targets: MakeTargets, generator: torch.Generator, dtype: torch.dtype
) -> None:
    """The other tokens get no teacher mass, but have student mass: a lower bound applies."""
    targets, _ = make_targets(generator, tokens=4, vocab=30, counts=[6] * 4)
    targets = targets._replace(logprobs_NK=torch.full((4, 6), 1.1 / 6).log())
    grad_NV = torch.randn(4, 30, generator=generator, dtype=dtype)
    spec = LossSpec(1.0, 1.0, "bucket", "reverse_kl")
    values_N, expected_NV = expected(grad_NV, targets, spec)
    terms = sparse_loss_(grad_NV, targets, spec)
    assert torch.isfinite(terms.divergence_N).all()
    assert torch.isfinite(grad_NV).all()
    torch.testing.assert_close(terms.divergence_N.double(), values_N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad_NV.double(), expected_NV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_ids_outside_the_vocabulary_move_to_the_tail(
    make_targets: MakeTargets, generator: torch.Generator, tail: str
) -> None:
    """An entry without a logit is treated as one that was not kept."""
    targets, _ = make_targets(generator, tokens=6, vocab=20, counts=[4] * 6)
    outside = targets.ids_NK.clone()
    outside[:, 1] = 20
    outside[2, 2] = 1000
    dropped = targets.logprobs_NK.masked_fill(outside >= 20, -torch.inf)
    logits_NV = torch.randn(6, 20, generator=generator)
    spec = LossSpec(1.0, 0.5, tail)  # type: ignore[arg-type]
    a, b = logits_NV.clone(), logits_NV.clone()
    terms_a = sparse_loss_(a, targets._replace(ids_NK=outside), spec)
    terms_b = sparse_loss_(b, targets._replace(logprobs_NK=dropped), spec)
    assert torch.equal(terms_a.divergence_N, terms_b.divergence_N)
    assert torch.equal(a, b)
    check(logits_NV.double(), targets._replace(ids_NK=outside), spec, atol=1e-9, grad_atol=1e-9)


@pytest.mark.parametrize("tail", TAILS)
def test_token_without_entries(
    make_targets: MakeTargets, generator: torch.Generator, tail: str
) -> None:
    """Without entries there is no divergence, only cross-entropy."""
    targets, _ = make_targets(generator, tokens=3, vocab=9, counts=[0, 2, 0])
    logits_NV = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    spec = LossSpec(2.0, 0.5, tail)  # type: ignore[arg-type]
    check(logits_NV, targets, spec, atol=1e-9, grad_atol=1e-9)
    empty, _ = make_targets(generator, tokens=2, vocab=9, counts=[0, 0])
    assert empty.ids_NK.shape == (2, 0)
    check(logits_NV[:2], empty, spec, atol=1e-9, grad_atol=1e-9)


@pytest.mark.parametrize("predictions", [False, True])
def test_no_tokens(make_targets: MakeTargets, predictions: bool) -> None:
    """N = 0 gives empty terms."""
    targets, _ = make_targets(torch.Generator(), tokens=0, vocab=9)
    terms = sparse_loss_(torch.zeros(0, 9), targets, LossSpec(2.0, 0.5), predictions=predictions)
    assert terms.divergence_N.shape == terms.ce_N.shape == (0,)
    assert (terms.argmax_N is not None) == predictions


def test_predictions(make_targets: MakeTargets, generator: torch.Generator) -> None:
    """Argmax and its log-probability at temperature 1, kept entry or not."""
    targets, _ = make_targets(generator, tokens=30, vocab=12, temperature=2.0)
    logits_NV = torch.randn(30, 12, generator=generator)
    log_q_NV = torch.log_softmax(logits_NV, -1)
    terms = sparse_loss_(logits_NV, targets, LossSpec(2.0, 0.5), predictions=True)
    best = log_q_NV.max(-1)
    assert terms.argmax_N is not None
    assert torch.equal(terms.argmax_N, best.indices)
    torch.testing.assert_close(terms.argmax_logprob_N, best.values)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_far_logits_neither_overflow_nor_cancel(
    make_targets: MakeTargets, generator: torch.Generator, temperature: float
) -> None:
    """A student with nearly no tail mass (q_t below float32) has a finite loss."""
    targets, _ = make_targets(
        generator, tokens=4, vocab=40, counts=[3] * 4, temperature=temperature
    )
    logits_NV = torch.randn(4, 40, generator=generator)
    logits_NV.scatter_(1, targets.ids_NK, 250.0)
    logits_NV += 1e3
    spec = LossSpec(temperature, 0.5)
    divergence_N, grad_NV = expected(logits_NV, targets, spec)
    terms = sparse_loss_(logits_NV, targets, spec)
    assert torch.isfinite(terms.divergence_N).all()
    torch.testing.assert_close(terms.divergence_N.double(), divergence_N, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_NV.double(), grad_NV, rtol=1e-4, atol=1e-4)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.integers(2, 24),
    data=st.data(),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    alpha=st.floats(0, 1),
    tail=st.sampled_from(("auto", *TAILS)),
    divergence=st.sampled_from(DIVERGENCES),
    parameter=st.floats(0.01, 0.99),
    share=st.none() | st.floats(0, 1),
    log_step=st.sampled_from([0.0, 1.0]),
    inclusion=st.booleans(),
    outside=st.integers(0, 5),
)
def test_any_ragged_targets(
    make_targets: MakeTargets,
    seed: int,
    vocab: int,
    data: st.DataObject,
    temperature: float,
    alpha: float,
    tail: str,
    divergence: str,
    parameter: float,
    share: float | None,
    log_step: float,
    inclusion: bool,
    outside: int,
) -> None:
    """Random shapes: from no entry to the whole vocabulary in the same chunk, ids beyond it too."""
    if divergence == "reverse_kl":
        tail = "bucket"
    counts = data.draw(st.lists(st.integers(0, vocab), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(seed)
    targets, _ = make_targets(
        generator,
        tokens=len(counts),
        vocab=vocab,
        counts=counts,
        temperature=temperature,
        inclusion=inclusion,
    )
    student = max(1, vocab - outside)
    targets = targets._replace(label_N=targets.label_N.clamp(max=student - 1))
    logits_NV = torch.randn(len(counts), student, generator=generator, dtype=torch.float64) * 4
    spec = LossSpec(
        temperature,
        alpha,
        tail,  # type: ignore[arg-type]
        divergence,  # type: ignore[arg-type]
        control_variate=share,
        jsd_beta=parameter,
        skew_alpha=parameter,
        sampled_log_step=log_step,
    )
    # With all but one entry kept, float32 targets leave a tail of rounding noise whose size
    # both sides agree on only as far as they sum in the same order.
    check(logits_NV, targets, spec, atol=1e-7, grad_atol=1e-7)
