"""A row of another project's file to targets, or what is wrong with it.

Legend: L tokens, M lists, N supervised tokens, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.targets import CachedSequence, SparseTargets
from pipeline.cache.tools.foreign.formats import RawRow

__all__ = ["Imported", "imported_row"]

_ABOVE = 1e-3
"""A log-prob may lie so far above 0 by rounding to 16 bits."""
_MASS = 0.02
"""And a position's probabilities so far above 1 in sum."""
_LEAST = -60.0
"""Where nothing is left of 1 the label's bound is this, in nats."""


@dataclass(frozen=True, slots=True)
class Imported:
    """A row as the cache takes it."""

    row: CachedSequence
    tail_N: NDArray[np.float32]
    """Mass outside the entries; 0 where the file does not tell."""
    labels_outside: int
    """Supervised tokens whose own log-prob is not known."""
    rescaled: int
    """Positions whose probabilities summed to more than 1 and were divided by the sum."""
    largest_gap: float
    """Most mass that a position lacks to 1."""
    most_entries: int


def imported_row(raw: RawRow, *, sample_id: str, vocab_size: int, lossy: bool) -> Imported | str:
    """Return the row's targets; of a row that cannot be used what is wrong with it.

    Args:
        raw: as the file has it.
        sample_id: its name in the cache.
        vocab_size: ids are below it.
        lossy: probabilities that sum to more than 1 are divided by the sum.
    """
    ids_L, mask_L = raw.input_ids_L, raw.loss_mask_L
    if ids_L.size < 2:
        return "fewer than two tokens"
    if ids_L.min() < 0 or ids_L.max() >= vocab_size:
        return f"a token id outside the vocabulary of {vocab_size}"
    places_N = np.flatnonzero(mask_L)
    list_L = np.full(ids_L.size, -1)
    there_M = (raw.tokens_M >= 0) & (raw.tokens_M < ids_L.size)
    list_L[raw.tokens_M[there_M]] = np.flatnonzero(there_M)
    chosen_N = list_L[places_N]
    if (chosen_N < 0).any():
        return "a supervised token without a list of entries"
    starts_M = np.concatenate([[0], np.cumsum(raw.counts_M)])
    sizes_N = raw.counts_M[chosen_N]
    owner_E = np.repeat(np.arange(places_N.size), sizes_N)
    within_E = np.arange(owner_E.size) - np.repeat(np.cumsum(sizes_N) - sizes_N, sizes_N)
    take_E = np.repeat(starts_M[chosen_N], sizes_N) + within_E
    labels_N = raw.label_logprobs
    if labels_N is not None and not (np.isfinite(labels_N) & (labels_N <= _ABOVE)).all():
        return "a label_logprob that is no log-prob"
    entries_E, logprobs_E = raw.ids_E[take_E], raw.logprobs_E[take_E].astype(np.float64)
    if np.isnan(logprobs_E).any():
        return "a log-prob that is not a number"
    kept_E = logprobs_E > -np.inf  # what fills up short lists
    owner_E, entries_E, logprobs_E = owner_E[kept_E], entries_E[kept_E], logprobs_E[kept_E]
    if entries_E.size and (entries_E.min() < 0 or entries_E.max() >= vocab_size):
        return f"an entry's id outside the vocabulary of {vocab_size}"
    order_E = np.lexsort((entries_E, owner_E))
    owner_E, entries_E, logprobs_E = owner_E[order_E], entries_E[order_E], logprobs_E[order_E]
    if ((np.diff(entries_E) == 0) & (np.diff(owner_E) == 0)).any():
        return "an id twice at a position"
    counts_N = np.bincount(owner_E, minlength=places_N.size)
    if places_N.size and counts_N.min(initial=1) < 1:
        return "a supervised token without an entry"
    if not lossy and (logprobs_E > _ABOVE).any():
        return "a log-prob above 0"
    mass_N = np.bincount(owner_E, np.exp(logprobs_E), minlength=places_N.size)
    if not lossy and (mass_N > 1 + _MASS).any():
        return "probabilities of a position that sum to more than 1"
    rescaled = int((mass_N > 1 + _MASS).sum())
    logprobs_E = np.minimum(logprobs_E - np.log(np.maximum(mass_N, 1.0))[owner_E], 0.0)
    tail_N = np.clip(1.0 - mass_N, 0.0, 1.0)
    label_N, outside = _labels(raw, places_N, owner_E, entries_E, logprobs_E, tail_N)
    targets = SparseTargets(
        counts_N=counts_N.astype(np.int32),
        token_ids_E=entries_E.astype(np.int32),
        logprobs_E=logprobs_E.astype(np.float32),
        inclusion_E=None,
        temperatures=(1.0,),
        log_z_NG=np.zeros((places_N.size, 1), np.float32),
        entropy_NG=_entropy(owner_E, logprobs_E, tail_N)[:, None].astype(np.float32),
        label_logprob_N=label_N.astype(np.float32),
        largest_N=entries_E[np.lexsort((entries_E, -logprobs_E, owner_E))][
            np.cumsum(counts_N) - counts_N
        ].astype(np.int32),
    )
    row = CachedSequence(sample_id, ids_L.astype(np.int32), mask_L, targets)
    return Imported(
        row,
        tail_N.astype(np.float32),
        outside,
        rescaled,
        float((1.0 - mass_N).max(initial=0.0)),
        int(counts_N.max(initial=0)),
    )


def _labels(
    raw: RawRow,
    places_N: NDArray[np.int64],
    owner_E: NDArray[np.int64],
    entries_E: NDArray[np.int64],
    logprobs_E: NDArray[np.float64],
    tail_N: NDArray[np.float64],
) -> tuple[NDArray[np.float64], int]:
    """Return each label's log-prob, or the least bound on it, and how many are bounds."""
    if raw.label_logprobs is not None:
        return np.minimum(raw.label_logprobs, 0.0), 0
    least_N = np.full(places_N.size, 0.0)
    np.minimum.at(least_N, owner_E, logprobs_E)
    with np.errstate(divide="ignore"):
        bound_N = np.minimum(least_N, np.log(tail_N))
    label_N = np.maximum(bound_N, _LEAST)
    is_label_E = entries_E == raw.input_ids_L[places_N][owner_E]
    label_N[owner_E[is_label_E]] = logprobs_E[is_label_E]
    return label_N, places_N.size - int(is_label_E.sum())


def _entropy(
    owner_E: NDArray[np.int64], logprobs_E: NDArray[np.float64], tail_N: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the entropy of the entries and one tail token: never above the teacher's own."""
    kept_N = np.bincount(owner_E, -np.exp(logprobs_E) * logprobs_E, minlength=tail_N.size)
    log_tail_N = np.log(np.where(tail_N > 0, tail_N, 1.0))
    return np.asarray(kept_N - tail_N * log_tail_N)
