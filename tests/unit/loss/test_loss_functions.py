"""The loss as a function of hidden states or logits: the dense reference, shapes, errors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pipeline.api.sparse_kl import sparse_kl, sparse_kl_of_logits
from pipeline.api.targets import TeacherTargets
from pipeline.errors import ConfigError
from pipeline.loss import reference
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from pipeline.sampling.inclusion import InclusionRule

MakeTargets = Callable[..., tuple[HeadTargets, Tensor]]
T, N, D, V = 16, 10, 6, 23
RULE = InclusionRule((1.0, 2.0), (0.01, 0.01))


def _problem(
    generator: torch.Generator,
    make_targets: MakeTargets,
    temperature: float,
    *,
    sampled: bool = False,
) -> tuple[Tensor, nn.Linear, TeacherTargets]:
    """Return hidden states of a whole batch [1, T, D], a head with 4 rows of padding, targets."""
    entries, _ = make_targets(
        generator, tokens=N, vocab=V, temperature=temperature, inclusion=sampled
    )
    hidden_1TD = torch.randn(1, T, D, generator=generator, dtype=torch.float64).requires_grad_()
    head = nn.Linear(D, V + 4, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V + 4, D, generator=generator, dtype=torch.float64))
    index_N = torch.randperm(T, generator=generator)[:N].sort().values
    rule = RULE if sampled else None
    return hidden_1TD, head, TeacherTargets(index_N, entries, T, temperature, V, rule=rule)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("way", ["hidden", "picked", "logits", "picked logits"])
def test_loss_and_gradients_are_the_references(
    generator: torch.Generator,
    make_targets: MakeTargets,
    temperature: float,
    alpha: float,
    sampled: bool,
    way: str,
) -> None:
    hidden_1TD, head, targets = _problem(generator, make_targets, temperature, sampled=sampled)
    picked_ND = hidden_1TD[0, targets.index_N]
    spec = LossSpec(temperature=temperature, alpha=alpha, rule_highest=2.0 if sampled else 0.0)
    wanted = reference.loss_sum(head(picked_ND)[:, :V], targets.entries, spec) / N
    leaves = (hidden_1TD, head.weight, head.bias)
    wanted_grads = torch.autograd.grad(wanted, leaves)

    if way == "hidden":
        loss = sparse_kl(hidden_1TD, head, targets, alpha=alpha, chunk_rows=3)
    elif way == "picked":
        loss = sparse_kl(hidden_1TD[0, targets.index_N], head, targets, alpha=alpha)
    elif way == "logits":
        loss = sparse_kl_of_logits(head(hidden_1TD), targets, alpha=alpha)
    else:
        loss = sparse_kl_of_logits(head(hidden_1TD[:, targets.index_N]), targets, alpha=alpha)
    assert torch.allclose(loss, wanted, rtol=1e-6)
    for grad, expected in zip(torch.autograd.grad(loss, leaves), wanted_grads, strict=True):
        assert torch.allclose(grad, expected, rtol=1e-5, atol=1e-8)


def test_the_logits_are_not_changed_and_need_no_gradient(
    generator: torch.Generator, make_targets: MakeTargets
) -> None:
    hidden_1TD, head, targets = _problem(generator, make_targets, 2.0)
    logits = head(hidden_1TD).detach()
    before = logits.clone()
    loss = sparse_kl_of_logits(logits, targets)
    assert torch.equal(logits, before)
    assert not loss.requires_grad


def test_a_models_scale_and_soft_cap_are_used(
    generator: torch.Generator, make_targets: MakeTargets
) -> None:
    hidden_1TD, head, targets = _problem(generator, make_targets, 1.0)
    config = SimpleNamespace(logit_scale=0.5, final_logit_softcapping=4.0, model_type="made up")
    model = SimpleNamespace(config=config, get_output_embeddings=lambda: head)
    logits = 4.0 * torch.tanh(head(hidden_1TD) * 0.5 / 4.0)
    wanted = sparse_kl_of_logits(logits, targets)
    assert torch.allclose(sparse_kl(hidden_1TD, model, targets), wanted)


def test_a_weight_alone_and_the_sum(generator: torch.Generator, make_targets: MakeTargets) -> None:
    hidden_1TD, head, targets = _problem(generator, make_targets, 1.0)
    with torch.no_grad():
        head.bias.zero_()
    mean = sparse_kl(hidden_1TD, head.weight, targets)
    assert torch.allclose(sparse_kl(hidden_1TD, head, targets, reduction="sum"), mean * N)


def test_targets_without_a_token_give_zero(generator: torch.Generator) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    entries = HeadTargets(
        none.reshape(0, 0), torch.zeros(0, 0), None, torch.zeros(0), torch.zeros(0), none
    )
    targets = TeacherTargets(none, entries, 1, 1.0, V)
    hidden_11D = torch.randn(1, 1, D, generator=generator).requires_grad_()
    loss = sparse_kl(hidden_11D, nn.Linear(D, V), targets)
    loss.backward()
    assert loss.item() == 0.0


def test_mistakes_are_said(generator: torch.Generator, make_targets: MakeTargets) -> None:
    hidden_1TD, head, targets = _problem(generator, make_targets, 1.0)
    with pytest.raises(ConfigError, match=r"shape \[1, 7, 6\]; expected \[1, 16, \.\.\.\]"):
        sparse_kl(hidden_1TD[:, :7], head, targets)
    with pytest.raises(ConfigError, match="a head of 20 rows; expected at least the 23 tokens"):
        sparse_kl(hidden_1TD, head.weight[:20], targets)
    with pytest.raises(ConfigError, match="a head of type Embedding"):
        sparse_kl(hidden_1TD, nn.Embedding(V, D), targets)
    with pytest.raises(ConfigError) as error:
        sparse_kl(hidden_1TD, head, targets, alpha=2.0, divergence="kl", tail="none")  # type: ignore[arg-type]
    assert len(error.value.mistakes) == 3
    with pytest.raises(ConfigError, match="reduction 'max'"):
        sparse_kl(hidden_1TD, head, targets, reduction="max")  # type: ignore[arg-type]
