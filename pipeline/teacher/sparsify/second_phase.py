"""Of the entries that a device drew, those that are kept: drawn along the whole sequence.

A device draws the entries of one position at a time, more of them than are kept, with probability
pi_1 (`SparseScheme.first_phase`). Here a second draw keeps each candidate with probability
pi / pi_1, so that an entry is kept with pi (two-phase sampling: Neyman 1938). Over the whole
sequence, it keeps the number of a position's entries and the number of times that a token is kept
within one of their means (`dependent_rounding`); independent draws would repeat a token by chance.

Why that helps. The gradient of the head's weight in a token's row is a sum over positions of the
error of its probability times the hidden state. Hidden states of one sequence share a large part,
so these errors add up. If a token that was kept at one position is left out at others, they cancel.
The weights are what they were: no reader knows the difference.

Legend: N positions, P places of a device's columns, E entries, G temperatures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.sampling.noise import dither, mix, row_noise
from pipeline.teacher.sparsify.sparse_scheme import SparseScheme

__all__ = ["Kept", "draw_candidates", "second_phase"]

_COUNTER = 1 << 40
"""First of the hash's counters, beyond those of rows."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of a sequence, without labels, in no order."""

    position_E: NDArray[np.int64]
    ids_E: NDArray[np.int32]
    logprobs_E: NDArray[np.float32]
    """On the position's grid where an entry is sampled."""
    inclusion_E: NDArray[np.float32]
    """1 where it is always kept."""
    left_N: NDArray[np.float32]
    """Mass that the device always kept and the rule does not."""


def second_phase(
    ids_NP: NDArray[np.int32],
    logprobs_NP: NDArray[np.float32],
    log_z_NG: NDArray[np.float32],
    scheme: SparseScheme,
    *,
    label_N: NDArray[np.integer],
    label_logprob_N: NDArray[np.float32],
    key: int,
    rows_N: NDArray[np.integer],
) -> Kept:
    """Draw from a sequence's candidates.

    Args:
        ids_NP: of the first phase's always-kept places, in any order, then of its sampled ones;
            -1 in an empty one.
        logprobs_NP: theirs, as the device returned them.
        log_z_NG: as stored.
        scheme: with a rule.
        label_N: what follows each position; among its largest, too, but in no place.
        label_logprob_N: its log p.
        key: of the sample.
        rows_N: the position in the sequence that predicts each token.
    """
    rule, first, quantisation = scheme.rule, scheme.first_phase, scheme.quantisation
    assert rule is not None
    assert first.rule is not None
    position_E, place_E = np.nonzero(ids_NP >= 0)
    ids_E, logprobs_E = ids_NP[position_E, place_E], logprobs_NP[position_E, place_E]
    log_z_EG = log_z_NG[position_E]
    exact_E = place_E < first.always_kept_places
    places = first.always_kept_places
    larger_NK = _larger(ids_NP[:, :places], logprobs_NP[:, :places], label_N, label_logprob_N)
    always_E = exact_E.copy()
    always_E[exact_E] = larger_NK[position_E[exact_E], place_E[exact_E]] < scheme.top_k
    always_E[exact_E] |= rule.ratio(logprobs_E[exact_E], log_z_EG[exact_E]) >= 1
    # The device's always-kept entries that the rule samples go onto their position's grid.
    leaves_E = exact_E & ~always_E
    left_N = np.bincount(
        position_E[leaves_E], np.exp(logprobs_E[leaves_E]), minlength=len(ids_NP)
    ).astype(np.float32)
    dither_e = dither(row_noise(key, rows_N))[position_E[leaves_E]]
    codes_e = quantisation.sampled_code(logprobs_E[leaves_E], dither_e)
    logprobs_E[leaves_E] = np.minimum(quantisation.sampled_value(codes_e, dither_e), 0)
    inclusion_E = rule.inclusion(logprobs_E, log_z_EG)
    before_E = np.ones(len(ids_E))
    before_E[~exact_E] = first.rule.inclusion(logprobs_E[~exact_E], log_z_EG[~exact_E])
    inclusion_E[always_E] = 1.0
    chosen = np.flatnonzero(~always_E)
    chosen = chosen[np.lexsort((position_E[chosen], ids_E[chosen]))]
    share_e = inclusion_E[chosen] / before_E[chosen]
    kept_E = always_E.copy()
    kept_E[chosen] = draw_candidates(share_e, position_E[chosen], ids_E[chosen], key)
    return Kept(
        position_E[kept_E],
        ids_E[kept_E],
        logprobs_E[kept_E],
        inclusion_E[kept_E].astype(np.float32),
        left_N,
    )


def _larger(
    ids_NK: NDArray[np.int32],
    logprobs_NK: NDArray[np.float32],
    label_N: NDArray[np.integer],
    label_logprob_N: NDArray[np.float32],
) -> NDArray[np.int64]:
    """Return how many entries of the position are larger than each; of equal ones by id."""
    keys_NK = np.where(ids_NK >= 0, -logprobs_NK, np.inf)
    order_NK = np.lexsort((ids_NK, keys_NK), axis=1)
    larger_NK = np.empty_like(order_NK)
    np.put_along_axis(larger_NK, order_NK, np.arange(ids_NK.shape[1])[None], axis=1)
    label_N1, value_N1 = label_N[:, None], label_logprob_N[:, None]
    first_NK = (value_N1 > logprobs_NK) | ((value_N1 == logprobs_NK) & (label_N1 < ids_NK))
    before_NK: NDArray[np.int64] = larger_NK + first_NK
    return before_NK


def draw_candidates(
    share_E: NDArray[np.float64], position_E: NDArray[np.int64], ids_E: NDArray[np.int32], key: int
) -> NDArray[np.bool_]:
    """Return which entries are drawn, each with its share.

    Args:
        share_E: 0 to 1.
        position_E: from 0 on.
        ids_E: ascending, and entries of one token by ascending position.
        key: of the random numbers.
    """
    from pipeline.teacher.sparsify.dependent_rounding import ONE, round_dependently

    weight_E = np.rint(np.minimum(share_E, 1.0) * ONE).astype(np.int64)
    positions = int(position_E.max(initial=-1)) + 1
    token_E = positions + np.cumsum(np.diff(ids_E, prepend=ids_E[:1]) != 0)
    ends_2E = np.stack([position_E, token_E])
    vertices = int(token_E.max(initial=-1)) + 1
    random_E = (mix(key, _COUNTER + np.arange(len(share_E))) >> np.uint64(34)).astype(np.int64)
    round_dependently(weight_E, ends_2E, vertices, random_E)
    chosen_E: NDArray[np.bool_] = weight_E == ONE
    return chosen_E
