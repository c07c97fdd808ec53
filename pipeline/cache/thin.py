"""Fewer entries a position: the largest stay, what is left out goes to the tail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.sparse import SparseTargets
from pipeline.errors import CacheError

__all__ = ["keep_top"]


def keep_top(
    targets: SparseTargets, tail_N: NDArray[np.float32], k: int
) -> tuple[SparseTargets, NDArray[np.float32]]:
    """Keep the k entries of highest probability of each position; of equal ones the lowest ids.

    All other columns are over the whole vocabulary and stay as they are.

    Args:
        targets: of N positions, every entry certain.
        tail_N: the mass outside the entries at temperature 1.
        k: entries to keep, at least 1; a position with fewer keeps all.

    Returns:
        The targets, and the tail mass with what was left out added to it.

    Raises:
        CacheError: the targets are sampled. An entry that was drawn with probability pi stands for
            many others; without it the estimate is biased, so there is no top-k of a sample.
    """
    if targets.inclusion_E is not None:
        raise CacheError(
            "the cache holds sampled targets, which have no largest entries to keep",
            expected="a cache of a top-k scheme",
            do="run cache-teacher with another --capture.scheme or fewer entries",
        )
    assert k >= 1, k
    counts_N = targets.counts_N
    owner_E = np.repeat(np.arange(counts_N.size), counts_N)
    # Rank within the position: by owner, then falling log p, then rising id.
    order_E = np.lexsort((targets.token_ids_E, -targets.logprobs_E, owner_E))
    first_N = np.cumsum(counts_N) - counts_N
    rank_E = np.empty(owner_E.size, np.int64)
    rank_E[order_E] = np.arange(owner_E.size) - first_N[owner_E]
    kept_E = rank_E < k
    mass_E = np.exp(targets.logprobs_E.astype(np.float64))
    dropped_N = np.bincount(owner_E[~kept_E], mass_E[~kept_E], minlength=counts_N.size)
    thinned = replace(
        targets,
        counts_N=np.minimum(counts_N, k).astype(np.int32),
        token_ids_E=targets.token_ids_E[kept_E],
        logprobs_E=targets.logprobs_E[kept_E],
    )
    return thinned, np.minimum(tail_N.astype(np.float64) + dropped_N, 1.0).astype(np.float32)
