"""With which probability an entry below tau is kept, and how the draws of a position depend.

What the help of `capture.tau` and FORMAT.md state: the sampler's own code over evenly spread noise,
against the formula.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.cache.codec.targets import SparseTargets
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.quantisation import SAMPLED_QUANTISATION
from pipeline.teacher.sparsify.columns import to_targets
from pipeline.teacher.sparsify.device import SparseScheme, sparsify

TAU = 1 / 28
VOCAB = 400
DRAWS = 8192
STEP = SAMPLED_QUANTISATION.sampled_step


def _scheme() -> SparseScheme:
    return SparseScheme(0, (1.0,), InclusionRule((1.0,), (TAU,)), SAMPLED_QUANTISATION)


def _probabilities() -> np.ndarray:
    """Return p with entries near and far below tau; the label, token 0, takes about a third."""
    near = TAU * np.array([0.98, 0.9, 0.7, 0.47])
    rest = np.exp(np.random.default_rng(3).normal(0, 1.6, VOCAB - 5))
    return np.concatenate([[1 / 3], near, (2 / 3 - near.sum()) * rest / rest.sum()])


def _drawn(p: np.ndarray, offsets: torch.Tensor, dithers: torch.Tensor) -> SparseTargets:
    noise = offsets << 24 | dithers
    label = torch.zeros(len(noise), dtype=torch.int64)
    logits = torch.from_numpy(np.log(p)).float().expand(len(noise), -1)
    columns = sparsify(logits, label, _scheme(), noise)
    targets, _ = to_targets(columns.numpy(), _scheme(), sample_id="s", label_N=label.numpy())
    return targets


def _even(number: int, top: int) -> torch.Tensor:
    return torch.arange(number) * top // number


def kept_probability(ratio: float, step: float) -> float:
    """Return the mean of min(1, ratio e^u), u uniform in +-step / 2; ratio is p / tau, below 1."""
    half = step / 2
    if ratio * math.exp(half) <= 1:
        return ratio * math.sinh(half) / half
    return (1 - ratio * math.exp(-half) + half + math.log(ratio)) / step


def test_an_entry_below_tau_is_kept_as_often_as_is_said() -> None:
    """Not with p / tau: 1.10 times as often where p is small, 0.85 times next to tau."""
    p = _probabilities()
    dithers = ((torch.arange(DRAWS).double() * 0.6180339887498949) % 1 * (1 << 24)).long()
    targets = _drawn(p, _even(DRAWS, 1 << 30), dithers)
    found = np.bincount(targets.token_ids_E, minlength=VOCAB) / DRAWS
    ratio = p / TAU
    assert (found[ratio >= 1] == 1).all()
    below = np.flatnonzero(ratio < 1)
    wanted = np.array([kept_probability(x, STEP) for x in ratio[below]])
    assert np.abs(found[below] - wanted).max() < 0.006
    assert np.abs(found[below] - ratio[below]).max() > 0.12, "p / tau is something else"
    small = below[ratio[below] < 0.4]
    assert found[small].sum() / ratio[small].sum() == pytest.approx(1.096, abs=0.003)


def test_the_numbers_that_are_said() -> None:
    """Those of the flag's help and of FORMAT.md, at the step that sampled caches have."""
    assert STEP == 1.5
    assert kept_probability(1e-3, STEP) / 1e-3 == pytest.approx(1.096, abs=5e-4)
    assert kept_probability(1 - 1e-9, STEP) == pytest.approx(0.852, abs=5e-4)
    u = (np.arange(100_000) + 0.5) / 100_000 - 0.5
    for ratio in (0.1, 0.4, 0.47, 0.48, 0.7, 0.99):
        mean = np.minimum(1, ratio * np.exp(STEP * u)).mean()
        assert kept_probability(ratio, STEP) == pytest.approx(mean, abs=1e-6)


def test_the_draws_of_a_position_are_not_independent() -> None:
    """Their number is within one of its mean; neighbours are never kept together."""
    p = _probabilities()
    targets = _drawn(p, _even(DRAWS, 1 << 30), torch.full((DRAWS,), 5 << 20))
    kept = np.zeros((DRAWS, VOCAB), bool)
    kept[np.repeat(np.arange(DRAWS), targets.counts_N), targets.token_ids_E] = True
    frequency = kept.mean(0)
    sampled = np.flatnonzero((frequency > 0) & (frequency < 1))
    numbers = kept[:, sampled].sum(1)
    assert np.abs(numbers - frequency[sampled].sum()).max() < 1
    one, other = sampled[:-1], sampled[1:]
    short = frequency[one] + frequency[other] < 0.95
    assert short.sum() > 100
    assert not (kept[:, one] & kept[:, other])[:, short].any()
    assert (frequency[one] * frequency[other])[short].max() > 0.05, "if they were independent"

    # The variance of a sum of f p / pi, over that of independent draws of the same probabilities:
    # f = 1, a random f, and an f that alternates with the running sum of the probabilities.
    pi = frequency[sampled]
    random = np.random.default_rng(0).normal(size=len(sampled))
    alternating = np.where(np.cumsum(pi) % 1 < 0.5, 1.0, -1.0)
    ratios = []
    for factor in (np.ones(len(sampled)), random, alternating):
        independent = (factor**2 * pi * (1 - pi)).sum()
        ratios.append(kept[:, sampled].dot(factor).var() / independent)
    print("systematic over independent variance:", *(f"{ratio:.2f}" for ratio in ratios))
    assert ratios[0] < 0.05
    assert 0.5 < ratios[1] < 2
    assert ratios[2] > 5
