"""Seeded draws: the right inclusion rule, and nothing but seed, step and logits decides them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.teacher.generation.seeded_sampling import SeededSampler, gumbel_noise, likeliest
from pipeline.teacher.generation.settings import GenerateSettings

LOGITS = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5, -3.0, 1.5, 1.5])
DRAWS = 40_000
_MASK = (1 << 64) - 1


def _draw(chosen: GenerateSettings, seeds: torch.Tensor, step: int = 0) -> torch.Tensor:
    sampler = SeededSampler(chosen, seeds, prompt_length=3, vocabulary=8)
    ids = torch.zeros((len(seeds), 3 + step), dtype=torch.int64)
    return sampler(ids, LOGITS.expand(len(seeds), -1)).argmax(-1)


def _chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    inside = expected > 0
    assert counts[~inside].sum() == 0, "drawn although left out"
    return float((((counts - expected) ** 2)[inside] / expected[inside]).sum())


def _rule(chosen: GenerateSettings) -> np.ndarray:
    """Return the distribution by the definitions, in float64 and in vLLM's order."""
    z = LOGITS.double().numpy() / chosen.temperature
    p = np.exp(z - z.max())
    p[p < chosen.min_p * p.max()] = 0
    if chosen.top_k:
        p[p < np.sort(p)[-chosen.top_k]] = 0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= chosen.top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize("by", ["seed", "step"])
@pytest.mark.parametrize(
    "chosen",
    [
        GenerateSettings(),
        GenerateSettings(temperature=0.5),
        GenerateSettings(temperature=2.0, min_p=0.1),
        GenerateSettings(top_k=4),
        GenerateSettings(top_p=0.8),
        GenerateSettings(temperature=1.3, top_p=0.9, top_k=6, min_p=0.02),
    ],
    ids=["plain", "cold", "min-p", "top-k", "top-p", "all"],
)
def test_draws_follow_the_rule(chosen: GenerateSettings, by: str) -> None:
    if by == "seed":
        drawn = _draw(chosen, torch.arange(DRAWS, dtype=torch.int64) * 7919 + 1)
    else:  # one response of many steps: its draws must be independent as well
        seeds = torch.full((8,), 123, dtype=torch.int64) + torch.arange(8)
        drawn = torch.cat([_draw(chosen, seeds, step) for step in range(DRAWS // 40)])
    counts = np.bincount(drawn.numpy(), minlength=8)
    rule = _rule(chosen)
    freedom = int((rule > 0).sum()) - 1
    # Fixed seeds: this is one number. Mean + 5 standard deviations of chi-square.
    bound = freedom + 5 * math.sqrt(2 * freedom)
    assert _chi_square(counts, rule * counts.sum()) < bound


def test_the_test_would_see_a_wrong_rule() -> None:
    drawn = _draw(GenerateSettings(temperature=1.05), torch.arange(DRAWS, dtype=torch.int64))
    counts = np.bincount(drawn.numpy(), minlength=8)
    assert _chi_square(counts, _rule(GenerateSettings()) * DRAWS) > 7 + 5 * math.sqrt(14)


def test_successive_draws_are_independent() -> None:
    """Pairs (draw at step t, draw at step t + 1) against the product of the inclusion rule."""
    seeds = torch.arange(DRAWS, dtype=torch.int64)
    first, second = _draw(GenerateSettings(), seeds, 4), _draw(GenerateSettings(), seeds, 5)
    pairs = np.bincount((first * 8 + second).numpy(), minlength=64)
    rule = np.outer(_rule(GenerateSettings()), _rule(GenerateSettings())).reshape(-1)
    assert _chi_square(pairs, rule * DRAWS) < 63 + 5 * math.sqrt(126)


def test_noise_is_gumbels() -> None:
    noise = gumbel_noise(torch.arange(64, dtype=torch.int64), 0, 4096).reshape(-1)
    assert noise.dtype == torch.float64
    assert bool(torch.isfinite(noise).all())
    assert float(noise.mean()) == pytest.approx(0.5772157, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)


def _reference(seed: int, step: int, token: int) -> float:
    """The noise with Python's integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        return x ^ (x >> 31)

    gamma = 0x9E3779B97F4A7C15
    key = mix((seed + gamma * (step + 1)) & _MASK)
    bits = mix((key + gamma * (token + 1)) & _MASK)
    return -math.log(-math.log(((bits >> 12) + 0.5) * 2.0**-52))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, (1 << 63) - 1), st.integers(0, 1 << 20), st.integers(1, 300), st.integers(1, 5)
)
def test_noise_is_a_function_of_seed_step_and_token(
    seed: int, step: int, vocabulary: int, rows: int
) -> None:
    seeds = torch.tensor([seed ^ row for row in range(rows)], dtype=torch.int64)
    noise = gumbel_noise(seeds, step, vocabulary)
    token = seed % vocabulary
    for row in range(rows):
        expected = _reference(seed ^ row, step, token)
        assert float(noise[row, token]) == pytest.approx(expected, rel=1e-12)
    # Alone, in another place, in a wider vocabulary: the same.
    alone = gumbel_noise(seeds[-1:], step, vocabulary + 7)
    assert torch.equal(alone[0, :vocabulary], noise[-1])


def test_extreme_bits_stay_finite() -> None:
    assert math.isfinite(-math.log(-math.log(((2**52 - 1) + 0.5) * 2.0**-52)))
    assert math.isfinite(-math.log(-math.log(0.5 * 2.0**-52)))


def test_greedy_takes_the_likeliest_and_records_what_it_saw() -> None:
    chosen = GenerateSettings(temperature=0, record_logprobs=True)
    sampler = SeededSampler(chosen, torch.tensor([1, 2]), prompt_length=2, vocabulary=8)
    rows = torch.stack([LOGITS, LOGITS.flip(0)])
    for step in range(3):
        ids = torch.zeros((2, 2 + step), dtype=torch.int64)
        assert sampler(ids, rows).argmax(-1).tolist() == [0, 7]
    recorded = sampler.logprobs()
    assert recorded is not None
    assert recorded.shape == (2, 3)
    expected = float(LOGITS[0] - LOGITS.logsumexp(0))
    assert recorded.numpy() == pytest.approx(expected, abs=1e-6)


def test_recorded_logprobs_are_of_the_whole_vocabulary_at_temperature_1() -> None:
    chosen = GenerateSettings(temperature=0.3, top_k=2, record_logprobs=True)
    seeds = torch.arange(20, dtype=torch.int64)
    sampler = SeededSampler(chosen, seeds, prompt_length=1, vocabulary=8)
    drawn = sampler(torch.zeros((20, 1), dtype=torch.int64), LOGITS.expand(20, -1)).argmax(-1)
    recorded = sampler.logprobs()
    assert recorded is not None
    assert torch.allclose(recorded[:, 0], LOGITS.log_softmax(0)[drawn], atol=1e-6)


@pytest.mark.parametrize("temperature", [0, 1])
def test_padding_of_the_head_is_never_drawn(temperature: int) -> None:
    chosen = GenerateSettings(temperature=temperature, record_logprobs=True)
    seeds = torch.arange(4000, dtype=torch.int64)
    sampler = SeededSampler(chosen, seeds, prompt_length=1, vocabulary=6)
    ids = torch.zeros((4000, 1), dtype=torch.int64)
    scores = LOGITS.expand(4000, -1).clone()
    scores[:, 6:] = 50.0
    drawn = sampler(ids, scores).argmax(-1)
    assert int(drawn.max()) == (5 if temperature else 0)
    rule = np.exp(LOGITS[:6].double().numpy())
    if temperature:
        counts = np.bincount(drawn.numpy(), minlength=6)
        assert _chi_square(counts, rule / rule.sum() * 4000) < 5 + 5 * math.sqrt(10)
    # What the teacher said is recorded as it is: the capture sees the whole head as well.
    recorded = sampler.logprobs()
    assert recorded is not None
    assert float(recorded.max()) < -40
    assert float(scores[0, 7]) == 50.0


def test_the_likeliest_ids_are_ordered_and_ties_go_to_the_lower() -> None:
    logits_BV = torch.tensor(
        [[1.0, 3.0, 2.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [5, 4, 3, 2, 1, 0]]
    )
    assert likeliest(logits_BV, 2).tolist() == [[1, 3], [0, 1], [0, 1]]
    assert likeliest(logits_BV, 4).tolist() == [[1, 3, 4, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert likeliest(torch.full((1, 4), torch.nan), 3).tolist() == [[0, 1, 2]]
    draw = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    wanted = draw.sort(dim=-1, descending=True, stable=True).indices[:, :20]
    assert likeliest(draw, 20).tolist() == wanted.tolist()
