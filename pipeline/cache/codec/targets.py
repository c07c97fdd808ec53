"""The sparse teacher target: ragged entries and exact statistics of supervised positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CachedSequence", "RequestedEntries", "SparseTargets"]


@dataclass(frozen=True, slots=True)
class RequestedEntries:
    """Entries of N positions that were asked for by id, as a writer of shards takes them."""

    counts_N: NDArray[np.int32]
    token_ids_E: NDArray[np.int32]
    """Distinct at a position, in any order; they may be entries of the scheme as well."""
    logprobs_E: NDArray[np.float32]
    """log p at temperature 1."""


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """Targets of N supervised positions; E entries in all; G temperatures.

    All logarithms are natural. Position n owns `counts_N[n]` consecutive entries.
    """

    counts_N: NDArray[np.int32]
    """Entries of each position."""
    token_ids_E: NDArray[np.int32]
    """Token ids in the teacher's vocabulary. Under an inclusion rule a position has three runs: the
    label (always kept), the other always-kept entries, the sampled ones."""
    logprobs_E: NDArray[np.float32]
    """log p of each entry at temperature 1, normalised over the WHOLE vocabulary."""
    inclusion_E: NDArray[np.float32] | None
    """Probability that the entry was kept, 1 for an always-kept one; None where all are always kept
    (top-k). An unbiased estimate divides by it."""
    temperatures: tuple[float, ...]
    """The grid; always contains 1.0."""
    log_z_NG: NDArray[np.float32]
    """log sum_j p_j^(1/T) over the whole vocabulary; 0 at T = 1."""
    entropy_NG: NDArray[np.float32]
    """Entropy of p_T over the whole vocabulary, in nats."""
    label_logprob_N: NDArray[np.float32]
    """log p, at temperature 1, of the token that follows in the text."""
    sampled_step: float = 0.0
    """Step, in nats, to which sampled entries' log p was rounded with dither; 0 where it was not.
    The mean of p^(1/T) is then too large by a known factor (`quantisation.rounding_log_bias`),
    which users divide out."""
    written_logprob_N: NDArray[np.float32] | None = None
    """log p of that token, at temperature 1, by the model that wrote it; None: not recorded."""
    largest_N: NDArray[np.int32] | None = None
    """The teacher's likeliest token of each position: the id of the largest entry before
    quantisation, which is always kept (the label may be it); -1 where there is no entry. None: the
    cache does not know it, only the quantised log-probs, of which several may be equal."""
    requested: RequestedEntries | None = None
    """Not among the entries yet, on the way into a shard; None of what is read."""
    requested_E: NDArray[np.bool_] | None = None
    """Of what is read: entries that are there only because they were asked for by id. Their log p
    is known exactly and their inclusion probability is 1. None: nothing was asked for."""

    @property
    def num_positions(self) -> int:
        """N."""
        return int(self.counts_N.shape[0])

    def entries(self, position: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return token ids and log-probabilities (at temperature 1) of one supervised position.

        Views, not copies. Of sampled targets each entry stands for 1 / `inclusion_E` of its kind.

        Raises:
            IndexError: there is no such position.
        """
        if not -self.num_positions <= position < self.num_positions:
            raise IndexError(f"position {position} of {self.num_positions}")
        stop = int(self.counts_N[: position % self.num_positions + 1].sum())
        part = slice(stop - int(self.counts_N[position]), stop)
        return self.token_ids_E[part], self.logprobs_E[part]


@dataclass(frozen=True, slots=True)
class CachedSequence:
    """One row of the cache: a tokenised sequence of L tokens and the teacher's targets."""

    sample_id: str
    """32 hexadecimal digits; the same for the same source and row, whatever the order."""
    input_ids_L: NDArray[np.int32]
    loss_mask_L: NDArray[np.bool_]
    """loss_mask_L[i]: token i is a label; its target is p(. | tokens before i). Never at i = 0."""
    targets: SparseTargets
    """Of the positions where `loss_mask_L` is true, in order."""
