"""Acceptance of the student's tokens by the teacher: unbiased of samples, a bound of a top-k."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from pipeline.loss.tokens.acceptance import accepted_mass
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.quantisation import rounding_log_bias

V = 60


def distributions(seed: int) -> tuple[np.ndarray, Tensor]:
    """Return log p and the student's logits, near each other in part of the vocabulary."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2.0, V)
    log_p = logits - np.log(np.exp(logits).sum())
    return log_p, torch.from_numpy(log_p + rng.normal(0, rng.choice([0.05, 2.0], V)))


def exact(log_p: np.ndarray, logits_V: Tensor) -> float:
    q_V = torch.softmax(logits_V, -1).numpy()
    return float(np.minimum(np.exp(log_p), q_V).sum())


@pytest.mark.parametrize("log_step", [0.0, 2.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sampled_entries_estimate_it_without_bias(
    draw_targets: Callable[..., HeadTargets], log_step: float, seed: int
) -> None:
    log_p, logits_V = distributions(seed)
    rule, draws = InclusionRule((1.0,), (0.05,)), 20_000
    targets = draw_targets(log_p, rule, temperature=1.0, draws=draws, seed=seed, log_step=log_step)
    spec = LossSpec(1.0, 1.0, sampled_log_step=log_step)
    terms = sparse_loss_(
        logits_V.repeat(draws, 1).clone(), targets, spec, gradient=False, predictions=True
    )
    assert terms.acceptance_N is not None
    error = float(terms.acceptance_N.std()) / draws**0.5
    bias = float(terms.acceptance_N.mean()) - exact(log_p, logits_V)
    assert abs(bias) < 4 * error
    # Tight enough to tell: a minimum of the corrected p would be too small.
    if log_step and seed == 1:
        log_q_NK = torch.log_softmax(logits_V, -1)[targets.ids_NK]
        known_NK = torch.isfinite(targets.logprobs_NK)
        assert targets.inclusion_NK is not None
        sampled_NK = targets.inclusion_NK < 1
        less_NK = targets.logprobs_NK - sampled_NK * rounding_log_bias(log_step, 1.0)
        corrected = targets._replace(logprobs_NK=less_NK)
        naive_N = accepted_mass(log_q_NK, corrected, known_NK, log_step=0.0)
        assert float(naive_N.mean()) - exact(log_p, logits_V) < -4 * error


def test_a_top_k_bounds_it_from_below() -> None:
    log_p, logits_V = distributions(4)
    ids_K = torch.from_numpy(np.argsort(-log_p)[:10].copy())
    ids_NK = torch.cat([ids_K, torch.tensor([V + 5])])[None]  # one outside the vocabulary
    targets = HeadTargets(
        ids_NK=ids_NK,
        logprobs_NK=torch.cat([torch.from_numpy(log_p)[ids_K], torch.tensor([-3.0])])[None],
        inclusion_NK=None,
        log_z_N=torch.zeros(1),
        entropy_N=torch.zeros(1),
        label_N=torch.zeros(1, dtype=torch.int64),
    )
    logits_NV = logits_V[None].clone()
    terms = sparse_loss_(logits_NV, targets, LossSpec(1.0, 1.0), gradient=False, predictions=True)
    q_V = torch.softmax(logits_V, -1)
    wanted = torch.minimum(torch.from_numpy(log_p).exp(), q_V)[ids_K].sum()
    assert terms.acceptance_N is not None
    torch.testing.assert_close(terms.acceptance_N[0], wanted)
    rest = min(1 - float(np.exp(log_p)[ids_K].sum()), 1 - float(q_V[ids_K].sum()))
    assert float(wanted) <= exact(log_p, logits_V) <= float(wanted) + rest


def test_it_is_of_targets_at_temperature_1_alone(
    make_targets: Callable[..., tuple[HeadTargets, Tensor]], generator: torch.Generator
) -> None:
    targets, log_p_NV = make_targets(generator, tokens=4, vocab=20, counts=[20] * 4)
    for temperature, predictions in ((2.0, True), (1.0, False)):
        terms = sparse_loss_(
            log_p_NV.clone(), targets, LossSpec(temperature, 1.0), gradient=False,
            predictions=predictions,
        )  # fmt: skip
        assert terms.acceptance_N is None
    terms = sparse_loss_(
        log_p_NV.clone(), targets, LossSpec(1.0, 1.0), gradient=False, predictions=True
    )
    torch.testing.assert_close(
        terms.acceptance_N, torch.ones(4, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )
