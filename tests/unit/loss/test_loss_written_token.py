"""The policy gradient of the written tokens: its expectation by enumeration, and its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.mistakes import validated
from pipeline.errors import ConfigError
from pipeline.loss import reference
from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.fused import FusedSpec, fused_head_loss
from pipeline.loss.settings import LossSettings
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets

VOCAB = 7


def _spec(alpha: float = 1.0, clip: float | None = None) -> LossSpec:
    return LossSpec(1.0, alpha, divergence="sampled_reverse_kl", importance_clip=clip)


def _targets(
    label_N: Tensor, log_p_NV: Tensor, log_w_NV: Tensor | None = None, *, entries: int = 3
) -> HeadTargets:
    """Return targets that hold other entries as well, which this divergence ignores."""
    top = log_p_NV.topk(entries, dim=-1)
    zeros_N = torch.zeros(len(label_N), dtype=torch.float64)
    at = label_N[:, None]
    return HeadTargets(
        top.indices, top.values, None, zeros_N, zeros_N, label_N,
        log_p_NV.gather(1, at)[:, 0],
        None if log_w_NV is None else log_w_NV.gather(1, at)[:, 0],
    )  # fmt: skip


def _distributions(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.log_softmax(
        torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5, dim=-1
    )


@pytest.mark.parametrize("by_ratio", [False, True])
def test_its_expectation_is_the_gradient_of_the_reverse_kl(
    generator: torch.Generator, by_ratio: bool
) -> None:
    log_p_V, log_w_V = _distributions(generator, 2, VOCAB)
    logits_V = torch.randn(VOCAB, generator=generator, dtype=torch.float64, requires_grad=True)
    spec = LossSpec(1.0, 1.0, divergence="reverse_kl")
    kl = reference.dense_divergence(logits_V[None], log_p_V[None], spec)[0]
    (wanted_V,) = torch.autograd.grad(kl, logits_V)
    every = torch.arange(VOCAB)  # each token once: the expectation is a sum of V terms
    log_q_V = torch.log_softmax(logits_V.detach(), -1)
    writer_V = log_w_V if by_ratio else log_q_V
    targets = _targets(every, log_p_V.expand(VOCAB, -1), writer_V.expand(VOCAB, -1))
    gradient_NV = logits_V.detach().expand(VOCAB, -1).clone()
    terms = sparse_loss_(gradient_NV, targets, _spec(clip=1e9 if by_ratio else None))
    found_V = (writer_V.exp()[:, None] * gradient_NV).sum(0)
    torch.testing.assert_close(found_V, wanted_V, rtol=1e-10, atol=1e-12)
    value = (writer_V.exp() * terms.divergence_N).sum()
    torch.testing.assert_close(value, kl.detach(), rtol=1e-10, atol=1e-12)


def test_without_a_ratio_another_writers_text_gives_half_the_squared_log_ratio(
    generator: torch.Generator,
) -> None:
    log_p_V, log_w_V = _distributions(generator, 2, VOCAB)
    logits_V = torch.randn(VOCAB, generator=generator, dtype=torch.float64, requires_grad=True)
    apart_V = torch.log_softmax(logits_V, -1) - log_p_V
    (wanted_V,) = torch.autograd.grad((log_w_V.exp() * apart_V.square()).sum() / 2, logits_V)
    gradient_NV = logits_V.detach().expand(VOCAB, -1).clone()
    sparse_loss_(gradient_NV, _targets(torch.arange(VOCAB), log_p_V.expand(VOCAB, -1)), _spec())
    torch.testing.assert_close((log_w_V.exp()[:, None] * gradient_NV).sum(0), wanted_V)


@pytest.mark.parametrize("clip", [None, 0.8, 3.0])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_the_fused_head_is_its_definition(
    generator: torch.Generator, clip: float | None, alpha: float, softcap: float | None
) -> None:
    tokens, width = 11, 5
    hidden_ND = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(VOCAB + 2, width, generator=generator, dtype=torch.float64)
    log_p_NV, log_w_NV = _distributions(generator, 2, tokens, VOCAB)
    label_N = torch.randint(0, VOCAB, (tokens,), generator=generator)
    targets = _targets(label_N, log_p_NV, log_w_NV)
    spec, leaves, found = _spec(alpha, clip), (hidden_ND, weight_VD), []
    for fused in (True, False):
        hidden, weight = (leaf.clone().requires_grad_() for leaf in leaves)
        if fused:
            how = FusedSpec(spec, chunk_rows=4, softcap=softcap, valid_vocab=VOCAB)
            terms = fused_head_loss(hidden, weight, None, targets, spec=how, predictions=True)
            loss = terms.loss
            assert terms.argmax_N is not None
        else:
            logits = hidden @ weight[:VOCAB].T
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            loss = reference.loss_sum(logits, targets, spec)
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_a_student_that_is_the_teacher_gets_no_gradient(generator: torch.Generator) -> None:
    log_p_NV = _distributions(generator, 4, VOCAB)
    gradient_NV = log_p_NV.clone()
    terms = sparse_loss_(gradient_NV, _targets(torch.arange(4), log_p_NV), _spec())
    assert terms.divergence_N.abs().max() < 1e-12
    assert gradient_NV.abs().max() < 1e-12


def test_measuring_is_the_forward_kl_over_the_entries(generator: torch.Generator) -> None:
    log_p_NV = _distributions(generator, 3, VOCAB)
    logits_NV = torch.randn(3, VOCAB, generator=generator, dtype=torch.float64)
    targets = _targets(torch.arange(3), log_p_NV, entries=VOCAB)
    measured = sparse_loss_(logits_NV.clone(), targets, _spec().for_measuring(1.0), gradient=False)
    wanted_N = reference.dense_kl(logits_NV, log_p_NV, temperature=1.0)
    torch.testing.assert_close(measured.divergence_N, wanted_N)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": 2.0}, "loss.temperature: found 2 with loss.divergence sampled_reverse_kl, "
         "expected 1"),
        ({"tail": "bucket"}, "loss.tail: found bucket with loss.divergence sampled_reverse_kl"),
        ({"control_variate": 0.5}, "loss.control_variate: found 0.5 with loss.divergence samp"),
        ({"weight": "gold_surprise"}, "loss.weight: found gold_surprise with loss.divergence samp"),
        ({"weight": "student_disagreement", "weight_quantile": 0.5}, "expected uniform or teacher"),
        ({"divergence": "reverse_kl", "importance_clip": 2.0}, "loss.importance_clip: found 2 "
         "with loss.divergence reverse_kl, expected none"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(changes: dict[str, Any], says: str) -> None:
    chosen = {"divergence": "sampled_reverse_kl", "temperature": 1.0, **changes}
    with pytest.raises(ConfigError, match=says):
        validated(LossSettings, chosen)


def test_a_weight_by_the_context_keeps_the_direction_and_one_by_the_token_does_not(
    generator: torch.Generator,
) -> None:
    """Why such weights are refused: over all tokens that could be written at one context."""
    (log_p_V,) = _distributions(generator, 1, VOCAB)
    logits_V = torch.randn(VOCAB, generator=generator, dtype=torch.float64, requires_grad=True)
    log_q_V = torch.log_softmax(logits_V, -1)
    (wanted_V,) = torch.autograd.grad((log_q_V.exp() * (log_q_V - log_p_V)).sum(), logits_V)
    gradient_NV = logits_V.detach().expand(VOCAB, -1).clone()
    sparse_loss_(gradient_NV, _targets(torch.arange(VOCAB), log_p_V.expand(VOCAB, -1)), _spec())
    q_V = log_q_V.detach().exp()
    entropy_V = torch.full((VOCAB,), float(-(log_p_V.exp() * log_p_V).sum()))
    for weight_V, same in ((entropy_V, True), (-log_p_V, False)):
        found_V = ((q_V * weight_V)[:, None] * gradient_NV).sum(0)
        cosine = torch.cosine_similarity(found_V, wanted_V, dim=0)
        assert (float(cosine) > 1 - 1e-9) is same, cosine


def test_all_that_does_not_go_together_is_told_at_once() -> None:
    chosen = {
        "divergence": "sampled_reverse_kl", "temperature": 2.0, "tail": "zero",
        "control_variate": 0.5, "weight_quantile": 0.5,
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        validated(LossSettings, chosen)
    message = str(caught.value)
    for name in ("temperature", "tail", "control_variate", "weight_quantile"):
        assert f"loss.{name}: found" in message
