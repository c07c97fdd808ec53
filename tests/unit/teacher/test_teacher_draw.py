"""Drawn entries: kept with the law's probability, unbiased at every temperature, gold always."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.counter import row_noise
from pipeline.cache.law import SamplingLaw
from pipeline.cache.sparse import SparseTargets
from pipeline.teacher.columns import to_targets
from pipeline.teacher.sparsify import SparseScheme, sparsify

GRID = (1.0, 2.0)
LAWS = [(1 / 20, 0.0), (0.0, 1 / 15), (1 / 6, 1 / 12)]
OFFSETS = 4096


def _draw(
    logits: torch.Tensor, gold: torch.Tensor, scheme: SparseScheme, noise: torch.Tensor
) -> SparseTargets:
    columns = sparsify(logits, gold, scheme, noise)
    assert columns.shape == (len(logits), scheme.num_columns)
    targets, _ = to_targets(columns.numpy(), scheme, sample_id="s", gold_N=gold.numpy())
    return targets


def _weights(targets: SparseTargets, vocab: int, column: int) -> np.ndarray:
    """Return the unbiased estimate of p_T as a dense [N, V]."""
    temperature = targets.temperatures[column]
    owner = np.repeat(np.arange(targets.num_positions), targets.counts_N)
    log_p = targets.logprobs_E.astype(np.float64) / temperature
    log_p -= targets.log_z_NG[owner, column]
    dense = np.zeros((targets.num_positions, vocab))
    assert targets.inclusion_E is not None
    dense[owner, targets.token_ids_E] = np.exp(log_p) / targets.inclusion_E
    return dense


@pytest.mark.parametrize("taus", LAWS)
@pytest.mark.parametrize("top_k", [0, 5])
def test_the_mean_over_all_noise_is_the_teacher(taus: tuple[float, float], top_k: int) -> None:
    # Systematic sampling over evenly spaced noise has the law's frequencies to 1 / OFFSETS.
    vocab = 300
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 3
    scheme = SparseScheme(top_k, GRID, SamplingLaw(GRID, taus))
    gold = torch.full((OFFSETS,), 17)
    noise = (torch.arange(OFFSETS) * (1 << 30)) // OFFSETS
    targets = _draw(logits.expand(OFFSETS, -1), gold, scheme, noise)
    p = torch.softmax(logits.double(), 0).numpy()
    for column, temperature in enumerate(GRID):
        if taus == (1 / 20, 0.0) and temperature != 1.0:
            continue  # this law stores no p of drawn entries: it serves T = 1 alone
        exact = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
        mean = _weights(targets, vocab, column).mean(0)
        drawn = np.abs(mean - exact)
        # Grid of log p (13 % of an entry at most, on average right) and of log Z (0.8 %).
        assert (drawn <= 0.14 * exact + 2 * max(taus) / OFFSETS).all()
        assert abs(mean.sum() - 1) < 0.012


@pytest.mark.parametrize("taus", LAWS)
def test_the_stored_probability_is_the_frequency(taus: tuple[float, float]) -> None:
    logits = torch.randn(200, generator=torch.Generator().manual_seed(2)) * 2
    law = SamplingLaw(GRID, taus)
    noise = (torch.arange(OFFSETS) * (1 << 30)) // OFFSETS
    gold = torch.zeros(OFFSETS, dtype=torch.int64)
    targets = _draw(logits.expand(OFFSETS, -1), gold, SparseScheme(0, GRID, law), noise)
    assert targets.inclusion_E is not None
    count = np.bincount(targets.token_ids_E, minlength=200) / OFFSETS
    for token in range(1, 200):
        at = targets.token_ids_E == token
        if not at.any():
            continue
        inclusion = np.unique(targets.inclusion_E[at])
        assert len(inclusion) == 1
        if not law.weights_only or inclusion[0] == 1:
            assert count[token] == pytest.approx(inclusion[0], abs=2 / OFFSETS)
    assert count[0] == 1  # gold


@given(
    rows=st.integers(1, 9),
    vocab=st.integers(3, 120),
    seed=st.integers(0, 2**31),
    chunk=st.integers(1, 4),
    law=st.sampled_from(LAWS),
    top_k=st.sampled_from([0, 2]),
    sharpness=st.sampled_from([0.0, 0.5, 4.0, 40.0]),
)
@settings(max_examples=80, deadline=None)
def test_every_draw_is_well_formed_and_independent_of_the_chunks(
    rows: int,
    vocab: int,
    seed: int,
    chunk: int,
    law: tuple[float, float],
    top_k: int,
    sharpness: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * sharpness
    gold = torch.randint(vocab, (rows,), generator=generator)
    scheme = SparseScheme(top_k, GRID, SamplingLaw(GRID, law))
    noise = torch.from_numpy(row_noise(seed, np.arange(rows)))
    whole = sparsify(logits, gold, scheme, noise)
    pieces = [
        sparsify(logits[i : i + chunk], gold[i : i + chunk], scheme, noise[i : i + chunk])
        for i in range(0, rows, chunk)
    ]
    assert torch.equal(whole, torch.cat(pieces))
    targets = _draw(logits, gold, scheme, noise)
    assert targets.inclusion_E is not None
    assert (targets.counts_N <= 1 + scheme.certain_places + scheme.drawn_places).all()
    starts = np.cumsum([0, *targets.counts_N])
    for row in range(rows):
        part = slice(starts[row], starts[row + 1])
        ids, inclusion = targets.token_ids_E[part], targets.inclusion_E[part]
        assert ids[0] == gold[row]
        assert inclusion[0] == 1
        assert len(set(ids.tolist())) == len(ids)
        assert ids.max() < vocab
        certain = inclusion == 1
        assert (np.diff(certain.astype(int)) <= 0).all()  # certain ones first
        assert (np.diff(ids[1:][certain[1:]]) > 0).all()
        assert (np.diff(ids[~certain]) > 0).all()
        assert ((inclusion > 0) & (targets.logprobs_E[part] <= 0)).all()


def test_the_count_is_within_one_of_its_mean() -> None:
    logits = torch.zeros(400)  # flat: the law's sum is 20 at every row
    law = SamplingLaw((1.0,), (1 / 20,))
    scheme = SparseScheme(0, (1.0,), law)
    noise = torch.from_numpy(row_noise(5, np.arange(64)))
    targets = _draw(logits.expand(64, -1), torch.zeros(64, dtype=torch.int64), scheme, noise)
    # Gold is certain and out of the sum: 20 * 399 / 400 = 19.95 drawn.
    assert set(targets.counts_N.tolist()) <= {20, 21}
    weights = _weights(targets, 400, 0)
    np.testing.assert_allclose(weights[:, 1:].sum(1), 1, atol=0.06)


def test_noise_depend_on_sample_and_row_alone() -> None:
    rows = np.array([3, 1, 40_000])
    np.testing.assert_array_equal(row_noise(9, rows)[::-1], row_noise(9, rows[::-1]))
    assert (row_noise(9, rows) != row_noise(10, rows)).all()
    many = row_noise(12, np.arange(20_000)) / 2**30
    assert abs(many.mean() - 0.5) < 0.01
    assert abs((many**2).mean() - 1 / 3) < 0.01
    assert abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.03


def test_a_law_that_is_none_is_refused() -> None:
    for taus in ((0.0, 0.0), (1.0, 0.0), (0.5,), (-0.1, 0.2), (float("nan"), 0.2)):
        with pytest.raises(Exception, match="sampling law"):
            SamplingLaw(GRID, taus)
