"""The second draw: over a sequence's candidates, each token's entries spread over positions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from pipeline.cache.codec.targets import SparseTargets
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.noise import row_noise, sample_key
from pipeline.teacher.sparsify.columns import to_targets
from pipeline.teacher.sparsify.device import SparseScheme, sparsify

POSITIONS, VOCAB, TAU = 96, 200, 1 / 8
RULE = InclusionRule((1.0,), (TAU,))


def _logits() -> torch.Tensor:
    """Return positions that are alike, as those of one text are: [N, V]."""
    generator = torch.Generator().manual_seed(3)
    shared_V = torch.randn(VOCAB, generator=generator) * 2
    return shared_V + torch.randn(POSITIONS, VOCAB, generator=generator) * 0.5


def _drawn(number: int, oversampling: float, *, top_k: int = 0) -> SparseTargets:
    scheme = SparseScheme(top_k, (1.0,), RULE, oversampling=oversampling)
    name, rows_N = f"{number:032x}"[::-1], np.arange(POSITIONS) + 5
    noise_N = torch.from_numpy(row_noise(sample_key(name), rows_N))
    label_N = np.zeros(POSITIONS, np.int64)
    columns = sparsify(_logits(), torch.from_numpy(label_N), scheme.first_phase, noise_N)
    targets, tail_N = to_targets(
        columns.numpy(), scheme, sample_id=name, label_N=label_N, rows_N=rows_N
    )
    assert targets.inclusion_E is not None
    sure_E = targets.inclusion_E == 1
    owner_E = np.repeat(np.arange(POSITIONS), targets.counts_N)
    known_N = np.bincount(owner_E[sure_E], np.exp(targets.logprobs_E[sure_E]), POSITIONS)
    np.testing.assert_allclose(known_N + tail_N, 1, atol=1e-5)
    return targets


def test_the_candidates_are_many_and_the_kept_as_many_as_the_rule_says() -> None:
    scheme = SparseScheme(0, (1.0,), RULE, oversampling=4.0)
    assert scheme.first_phase.rule == InclusionRule((1.0,), (TAU / 4,))
    assert scheme.first_phase.first_phase == scheme.first_phase
    fine = SparseScheme(0, (1.0,), InclusionRule((1.0,), (1 / 300,)), oversampling=4.0)
    assert fine.first_phase.rule == fine.rule, "a device's places are not for ever"
    once = np.mean([_drawn(n, 1.0).counts_N.mean() for n in range(10)])
    twice = np.mean([_drawn(n, 4.0).counts_N.mean() for n in range(10)])
    assert twice == pytest.approx(once, rel=0.03)


def test_a_summed_error_is_smaller_than_of_draws_that_are_independent() -> None:
    """Squared errors of every token's sum over the positions: what hidden states share."""
    p_V = torch.softmax(_logits().double(), -1).sum(0).numpy()

    def squared(oversampling: float) -> float:
        total = 0.0
        for number in range(40):
            targets = _drawn(number, oversampling)
            assert targets.inclusion_E is not None
            p_E = np.exp(targets.logprobs_E.astype(np.float64)) / targets.inclusion_E
            bias = np.sinh(targets.sampled_step / 2) / (targets.sampled_step / 2)
            p_E[targets.inclusion_E < 1] /= bias
            total += np.square(np.bincount(targets.token_ids_E, p_E, VOCAB) - p_V).sum()
        return total

    assert squared(4.0) < 0.6 * squared(1.0)


@pytest.mark.parametrize("top_k", [0, 3])
def test_runs_are_in_order_and_the_draw_is_the_samples_own(top_k: int) -> None:
    targets = _drawn(1, 4.0, top_k=top_k)
    assert targets.inclusion_E is not None
    again = _drawn(1, 4.0, top_k=top_k)
    np.testing.assert_array_equal(targets.token_ids_E, again.token_ids_E)
    assert targets.token_ids_E.tobytes() != _drawn(2, 4.0, top_k=top_k).token_ids_E.tobytes()
    starts = np.cumsum([0, *targets.counts_N])
    for begin, end in pairwise(starts.tolist()):
        ids, inclusion = targets.token_ids_E[begin:end], targets.inclusion_E[begin:end]
        assert ids[0] == 0
        assert inclusion[0] == 1
        sampled = inclusion < 1
        assert (np.diff(sampled.astype(int)) >= 0).all()
        assert (np.diff(ids[1:][~sampled[1:]]) > 0).all()
        assert (np.diff(ids[sampled]) > 0).all()
        assert (~sampled).sum() >= top_k
