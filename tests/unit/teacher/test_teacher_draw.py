"""Sampled entries: kept as the rule says, unbiased at every temperature, the label always."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.codec.targets import SparseTargets
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.noise import dither, offset, row_noise
from pipeline.sampling.quantisation import rounding_log_bias
from pipeline.teacher.sparsify.columns import kept_entries, to_targets
from pipeline.teacher.sparsify.device import SparseScheme, sparsify

GRID = (1.0, 2.0)
RULES = [(1 / 20, 0.0), (0.0, 1 / 15), (1 / 6, 1 / 12)]
DRAWS = 8192


def _draw(
    logits: torch.Tensor, label: torch.Tensor, scheme: SparseScheme, noise: torch.Tensor
) -> SparseTargets:
    columns = sparsify(logits, label, scheme, noise)
    assert columns.shape == (len(logits), scheme.num_columns)
    targets, _ = to_targets(columns.numpy(), scheme, sample_id="s", label_N=label.numpy())
    return targets


def _all_noise() -> torch.Tensor:
    """Return evenly spread pairs of offset and dither, by the golden ratio."""
    place = torch.arange(DRAWS)
    offset = (place * (1 << 30)) // DRAWS
    dither = ((place.double() * 0.6180339887498949) % 1 * (1 << 24)).long()
    return offset << 24 | dither


def _weights(targets: SparseTargets, vocab: int, column: int) -> np.ndarray:
    """Return the unbiased estimate of p_T as a dense [N, V]."""
    temperature = targets.temperatures[column]
    owner = np.repeat(np.arange(targets.num_positions), targets.counts_N)
    log_p = targets.logprobs_E.astype(np.float64) / temperature
    log_p -= targets.log_z_NG[owner, column]
    dense = np.zeros((targets.num_positions, vocab))
    assert targets.inclusion_E is not None
    assert targets.sampled_step > 0
    log_p[targets.inclusion_E < 1] -= rounding_log_bias(targets.sampled_step, temperature)
    dense[owner, targets.token_ids_E] = np.exp(log_p) / targets.inclusion_E
    return dense


@pytest.mark.parametrize("taus", RULES)
@pytest.mark.parametrize("top_k", [0, 5])
def test_the_mean_over_all_noise_is_the_teacher(taus: tuple[float, float], top_k: int) -> None:
    vocab = 300
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 3
    scheme = SparseScheme(top_k, GRID, rule := InclusionRule(GRID, taus))
    p = torch.softmax(logits.double(), 0).numpy()
    tau = max(taus)
    assert ((tau * 0.6 < p) & (p < tau / 0.6)).any(), "the test is about entries near tau"
    targets = _draw(logits.expand(DRAWS, -1), torch.full((DRAWS,), 17), scheme, _all_noise())
    for column, temperature in enumerate(GRID):
        exact = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
        error = _weights(targets, vocab, column).mean(0) - exact
        # log Z lies on a grid of 1/64: a factor within 0.8 % for all. Evenly spread draws miss a
        # frequency by some draws (20 to 35), each of which counts p_T / pi.
        weight = exact / np.minimum(1, rule.ratio(np.log(p), targets.log_z_NG[:vocab]))
        assert (np.abs(error) <= 0.009 * exact + 60 * weight / DRAWS).all()
        assert abs(error.sum()) < 0.009 + 30 * weight.max() / DRAWS


@pytest.mark.parametrize("taus", RULES)
def test_the_stored_probability_is_the_frequency(taus: tuple[float, float]) -> None:
    """With the dither held, over evenly spaced offsets; 1 is said of always-kept entries alone."""
    logits = torch.randn(200, generator=torch.Generator().manual_seed(2)) * 2
    rule = InclusionRule(GRID, taus)
    noise = ((torch.arange(DRAWS) * (1 << 30)) // DRAWS) << 24 | 0x2F0000
    label = torch.zeros(DRAWS, dtype=torch.int64)
    targets = _draw(logits.expand(DRAWS, -1), label, SparseScheme(0, GRID, rule), noise)
    assert targets.inclusion_E is not None
    count = np.bincount(targets.token_ids_E, minlength=200) / DRAWS
    for token in range(1, 200):
        at = targets.token_ids_E == token
        if not at.any():
            continue
        inclusion = np.unique(targets.inclusion_E[at])
        assert len(inclusion) == 1
        assert count[token] == pytest.approx(inclusion[0], abs=3 / DRAWS)
    assert count[0] == 1  # label


def test_always_kept_is_what_the_exact_p_makes_so() -> None:
    """Not the rounded one, by which entries near tau lost up to 12 % of their mass."""
    p = np.array([0.30, 0.22, 0.18, 0.10, 0.08, 0.05, 0.04, 0.03])
    logits = torch.from_numpy(np.log(p)).float()
    scheme = SparseScheme(0, (1.0,), InclusionRule((1.0,), (0.15,)))
    label = torch.full((DRAWS,), 7)
    targets = _draw(logits.expand(DRAWS, -1), label, scheme, _all_noise())
    assert targets.inclusion_E is not None
    for token, always_kept in enumerate([True] * 3 + [False] * 4 + [True]):
        said = targets.inclusion_E[targets.token_ids_E == token] == 1
        assert said.all() == said.any() == always_kept, token


@given(
    rows=st.integers(1, 9),
    vocab=st.integers(3, 120),
    seed=st.integers(0, 2**31),
    chunk=st.integers(1, 4),
    rule=st.sampled_from(RULES),
    top_k=st.sampled_from([0, 2]),
    sharpness=st.sampled_from([0.0, 0.5, 4.0, 40.0]),
)
@settings(max_examples=80, deadline=None)
def test_every_draw_is_well_formed_and_independent_of_the_chunks(
    rows: int,
    vocab: int,
    seed: int,
    chunk: int,
    rule: tuple[float, float],
    top_k: int,
    sharpness: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * sharpness
    label = torch.randint(vocab, (rows,), generator=generator)
    scheme = SparseScheme(top_k, GRID, InclusionRule(GRID, rule))
    noise = torch.from_numpy(row_noise(seed, np.arange(rows)))
    whole = sparsify(logits, label, scheme, noise)
    pieces = [
        sparsify(logits[i : i + chunk], label[i : i + chunk], scheme, noise[i : i + chunk])
        for i in range(0, rows, chunk)
    ]
    assert torch.equal(whole, torch.cat(pieces))
    targets = _draw(logits, label, scheme, noise)
    assert targets.inclusion_E is not None
    # The label has no place of its own among the columns; the estimate of a cache's size counts it.
    assert kept_entries(whole.numpy(), scheme) == pytest.approx(targets.counts_N.mean())
    assert (targets.counts_N <= 1 + scheme.always_kept_places + scheme.sampled_places).all()
    starts = np.cumsum([0, *targets.counts_N])
    for row in range(rows):
        part = slice(starts[row], starts[row + 1])
        ids, inclusion = targets.token_ids_E[part], targets.inclusion_E[part]
        assert ids[0] == label[row]
        assert inclusion[0] == 1
        assert len(set(ids.tolist())) == len(ids)
        assert ids.max() < vocab
        always_kept = inclusion == 1
        assert (np.diff(always_kept.astype(int)) <= 0).all()  # always-kept ones first
        assert (np.diff(ids[1:][always_kept[1:]]) > 0).all()
        assert (np.diff(ids[~always_kept]) > 0).all()
        assert ((inclusion > 0) & (targets.logprobs_E[part] <= 0)).all()


def test_the_count_is_within_one_of_its_mean() -> None:
    logits = torch.zeros(400)  # flat: the inclusion rule's sum is 20 at every row
    rule = InclusionRule((1.0,), (1 / 20,))
    scheme = SparseScheme(0, (1.0,), rule)
    noise = torch.from_numpy(row_noise(5, np.arange(64)))
    targets = _draw(logits.expand(64, -1), torch.zeros(64, dtype=torch.int64), scheme, noise)
    # Label is always kept and out of the sum. All others are rounded to the same value.
    rounded = np.exp(targets.logprobs_E[1 + np.cumsum(targets.counts_N) - targets.counts_N])
    assert rounded.max() / rounded.min() > 2
    mean = 399 * rounded * 20
    assert (np.abs(targets.counts_N - 1 - mean) < 1).all()
    assert targets.counts_N.max() > 30, "more than 1 / tau, where the dither rounds up"


def test_noise_depend_on_sample_and_row_alone() -> None:
    rows = np.array([3, 1, 40_000])
    np.testing.assert_array_equal(row_noise(9, rows)[::-1], row_noise(9, rows[::-1]))
    assert (row_noise(9, rows) != row_noise(10, rows)).all()
    noise = row_noise(12, np.arange(20_000))
    many = offset(noise) / 2**30
    assert abs(many.mean() - 0.5) < 0.01
    assert abs((many**2).mean() - 1 / 3) < 0.01
    assert abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.03
    rounding = dither(noise)
    assert rounding.min() >= -0.5
    assert rounding.max() < 0.5
    assert abs(rounding.mean()) < 0.01
    assert abs(np.corrcoef(many, rounding)[0, 1]) < 0.03


def test_a_rule_that_is_none_is_refused() -> None:
    for taus in ((0.0, 0.0), (1.0, 0.0), (0.5,), (-0.1, 0.2), (float("nan"), 0.2)):
        with pytest.raises(Exception, match="inclusion rule"):
            InclusionRule(GRID, taus)
