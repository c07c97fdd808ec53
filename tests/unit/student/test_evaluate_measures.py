"""Ratio means and paired differences: their errors against simulation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluate.measures import HeldoutScores, paired_difference, ratio_mean
from tests.bench.demonstration import Pair, over_seeds


def _draw(rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of unequal length whose mean depends on the length, as real ones do."""
    counts = rng.integers(5, 200, number)
    means = 2 + 0.004 * counts + rng.normal(0, 0.5, number)
    return means * counts, counts


def test_value_is_the_mean_over_tokens() -> None:
    found = ratio_mean([10.0, 2.0], [5, 1])
    assert found.value == 2.0
    assert found.standard_error == 0.0
    found = ratio_mean([3.0, 1.0, 0.0], [1, 1, 2])
    assert found.value == 1.0
    # n/(n-1) * sum (s - R c)^2 / C^2 = 1.5 * (4 + 0 + 4) / 16
    assert found.standard_error == pytest.approx(math.sqrt(0.75))


def test_error_is_that_of_repeated_draws() -> None:
    rng = np.random.default_rng(0)
    found = [ratio_mean(*map(list, _draw(rng, 80))) for _ in range(3000)]
    values = np.array([item.value for item in found])
    stated = np.array([item.standard_error for item in found])
    assert np.sqrt(np.square(stated).mean()) == pytest.approx(values.std(), rel=0.05)
    sums, counts = _draw(rng, 2_000_000)
    covered = np.abs(values - sums.sum() / counts.sum()) < 1.96 * stated
    assert covered.mean() == pytest.approx(0.95, abs=0.02)


def test_error_is_that_of_the_bootstrap() -> None:
    rng = np.random.default_rng(1)
    sums, counts = _draw(rng, 150)
    picks = rng.integers(0, 150, (4000, 150))
    draws = sums[picks].sum(1) / counts[picks].sum(1)
    stated = ratio_mean(sums.tolist(), counts.tolist()).standard_error
    assert stated == pytest.approx(draws.std(), rel=0.1)


def test_too_little_to_say() -> None:
    assert math.isnan(ratio_mean([], []).value)
    assert math.isnan(ratio_mean([0.0, 0.0], [0, 0]).value)
    assert ratio_mean([3.0], [2]).value == 1.5
    assert math.isnan(ratio_mean([3.0], [2]).standard_error)


def _scores(sums: np.ndarray, counts: np.ndarray) -> HeldoutScores:
    return HeldoutScores(
        sample_ids=tuple(f"{i:032x}" for i in range(len(counts))),
        loss_tokens=tuple(counts.tolist()),
        sums={"kl": tuple(sums.tolist()), "cross_entropy": tuple((sums / 4).tolist())},
        confidence_bins=((1.0, 2, 4), (5.0, 4, 6)),
    )


def test_pairing_removes_what_both_share() -> None:
    rng = np.random.default_rng(2)
    draws, stated = [], []
    for _ in range(1500):
        sums, counts = _draw(rng, 60)
        other = sums - 0.02 * counts + rng.normal(0, 0.05, 60) * counts
        found = paired_difference(_scores(sums, counts), _scores(other, counts), "kl")
        unpaired = ratio_mean(sums.tolist(), counts.tolist()).standard_error
        assert found.standard_error < unpaired / 3
        draws.append(found.value)
        stated.append(found.standard_error)
    assert np.mean(draws) == pytest.approx(0.02, abs=0.001)
    assert np.sqrt(np.square(stated).mean()) == pytest.approx(np.std(draws), rel=0.06)


def test_sign_and_sequences_of_a_paired_difference() -> None:
    counts = np.array([2, 2])
    better, worse = _scores(np.array([2.0, 2.0]), counts), _scores(np.array([4.0, 4.0]), counts)
    assert paired_difference(worse, better, "kl").value == 1.0
    other = HeldoutScores(("x", "y"), better.loss_tokens, better.sums)
    with pytest.raises(AssertionError, match="same sequences"):
        paired_difference(better, other, "kl")


def test_scores_and_their_file(tmp_path: Path) -> None:
    sums, counts = _draw(np.random.default_rng(3), 30)
    scores = _scores(sums, counts)
    assert scores.mean("kl").value == pytest.approx(sums.sum() / counts.sum())
    entropy = scores.mean("cross_entropy")
    perplexity = scores.perplexity()
    assert perplexity.value == pytest.approx(math.exp(entropy.value))
    assert perplexity.standard_error == pytest.approx(perplexity.value * entropy.standard_error)
    unsure = scores.calibration_error()
    assert unsure is not None
    assert unsure.value == pytest.approx((1 + 1) / 10)
    assert math.isnan(unsure.standard_error), "an old file does not say it"
    assert HeldoutScores(("a",), (1,), {}).calibration_error() is None
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(scores.to_json()))
    assert HeldoutScores.read(str(file)) == scores


def _calibrated(
    confidence_T: np.ndarray, right_T: np.ndarray, owner_T: np.ndarray
) -> HeldoutScores:
    """Score tokens that belong to sequences, as `evaluate.heldout` does, in ten bins."""
    which_T = np.minimum((confidence_T * 10).astype(int), 9)
    bins = [
        (confidence_T[which_T == b].sum(), right_T[which_T == b].sum(), int((which_T == b).sum()))
        for b in range(10)
    ]
    sequences = int(owner_T.max()) + 1
    gaps = np.zeros((sequences, 10))
    np.add.at(gaps, (owner_T, which_T), confidence_T - right_T)
    return HeldoutScores(
        sample_ids=tuple(map(str, range(sequences))),
        loss_tokens=tuple(np.bincount(owner_T).tolist()),
        sums={},
        confidence_bins=tuple(bins),
        confidence_gaps=tuple(map(tuple, gaps.tolist())),
    )


def test_error_of_the_calibration_is_that_of_repeated_draws() -> None:
    rng = np.random.default_rng(4)
    owner_T = np.repeat(np.arange(100), 50)
    values, stated = [], []
    for _ in range(400):
        # A model that says 0.1 too much, on sequences that are easier or harder as a whole.
        confidence_T = rng.uniform(0.3, 0.95, owner_T.size)
        ease_S = rng.normal(0, 0.08, 100)
        right_T = rng.random(owner_T.size) < confidence_T - 0.1 + ease_S[owner_T]
        found = _calibrated(confidence_T, right_T.astype(float), owner_T).calibration_error()
        assert found is not None
        values.append(found.value)
        stated.append(found.standard_error)
    assert np.mean(values) == pytest.approx(0.1, abs=0.004)
    assert np.sqrt(np.square(stated).mean()) == pytest.approx(np.std(values), rel=0.1)


def test_calibration_is_compared_sequence_by_sequence() -> None:
    rng = np.random.default_rng(5)
    owner_T = np.repeat(np.arange(60), 40)
    confidence_T = rng.uniform(0.3, 0.9, owner_T.size)
    right_T = (rng.random(owner_T.size) < confidence_T - 0.1).astype(float)
    one = _calibrated(confidence_T, right_T, owner_T)
    other = _calibrated(confidence_T + 0.02, right_T, owner_T)
    found = paired_difference(other, one, "ece")
    assert found.value == pytest.approx(0.02, abs=0.002)
    assert found.standard_error < 0.002
    assert other.metrics == ("ece",)


def test_a_mean_over_seeds_has_the_errors_of_both() -> None:
    counts = (10, 20, 30)

    def scores(*sums: float) -> HeldoutScores:
        return HeldoutScores(("a", "b", "c"), counts, {"kl": sums})

    control = scores(20.0, 40.0, 60.0)
    pairs = [
        Pair(1, scores(18.0, 39.0, 57.0), control, 2.0),
        Pair(2, scores(19.0, 38.0, 51.0), control, 2.0),
    ]
    value, by_sequence, by_seed = over_seeds(pairs, "kl")
    assert value == pytest.approx(-(6 + 12) / 2 / 60)
    assert by_seed == pytest.approx(0.1 / math.sqrt(2) / math.sqrt(2))
    assert by_sequence == ratio_mean([-1.5, -1.5, -6.0], counts).standard_error
    assert math.isnan(over_seeds(pairs[:1], "kl")[2])
