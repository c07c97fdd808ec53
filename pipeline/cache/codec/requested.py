"""Requested entries: tokens whose log p was asked for by id, stored beside the scheme's own.

The writer of a text names the ids that it found likeliest itself; the teacher's log p of exactly
these is known, whatever its scheme keeps. They are a third run of each position, with a code of
their own, and a reader merges them into the entries (`merged`). What a scheme kept and sampled is
stored as if nobody had asked, so a reader without this page's columns reads an unbiased target.

Legend: S rows, N supervised positions of all of them, E entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.targets import SparseTargets
from pipeline.errors import CacheError

__all__ = [
    "MOST_REQUESTED",
    "REQUESTED_COLUMNS",
    "Merged",
    "joined_requested",
    "merged",
    "new_requested",
    "requested_code",
    "requested_values",
]

REQUESTED_COLUMNS = (
    "requested_counts", *(f"requested_ids_{stream}" for stream in range(4)), "requested_bits",
    "requested_values",
)  # fmt: skip
MOST_REQUESTED = 255
"""Of a position: its count is a byte."""
_SCALE, _STEP = 0.05, 0.028
"""log p = -scale * expm1(step * k), down to -63. A token of the writer's that the teacher finds
unlikely is what a reverse KL is about, so the code is finer than an always-kept entry's: log p is
off by at most 1.4 % of itself (and 0.0007), not by 3 % or 6 %."""


def requested_code(logprobs: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Return the code nearest to log p."""
    ratio = np.maximum(-np.asarray(logprobs, np.float64), 0.0) / _SCALE
    codes = np.clip(np.rint(np.log1p(ratio) / _STEP), 0, 255)
    return codes.astype(np.uint8)


def requested_values() -> NDArray[np.float32]:
    """Return log p of each of 256 codes."""
    values: NDArray[np.float64] = -_SCALE * np.expm1(_STEP * np.arange(256))
    return values.astype(np.float32)


def joined_requested(
    targets: Sequence[SparseTargets], label_ids_N: NDArray[np.int32] | None, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.uint8]]:
    """Return counts [N], ids and codes of the requested entries of all rows.

    Args:
        targets: of each row.
        label_ids_N: the labels, which are entries already and are left out; None: they need not be.
        vocab_size: every id is below it.

    Raises:
        CacheError: a row without them, of another length, an id out of range, a log p that is not
            finite, or more than 255 at a position.
    """
    parts = [target.requested for target in targets]
    known = [part for part in parts if part is not None]
    if len(known) != len(parts):
        raise CacheError("a sequence without requested entries in a cache that has them")
    counts_N = _concatenated([part.counts_N for part in known], np.int64)
    ids_E = _concatenated([part.token_ids_E for part in known], np.int32)
    logprobs_E = _concatenated([part.logprobs_E for part in known], np.float32)
    if len(counts_N) != sum(target.num_positions for target in targets) or not (
        counts_N.sum() == ids_E.size == logprobs_E.size
    ):
        raise CacheError("the requested entries of a sequence differ in length")
    if ids_E.size and (ids_E.min() < 0 or ids_E.max() >= vocab_size):
        raise CacheError(f"a requested token id is outside the vocabulary of {vocab_size}")
    if not np.isfinite(logprobs_E).all():
        raise CacheError("a log-probability of a requested entry is not finite")
    if label_ids_N is not None:
        owner_E = np.repeat(np.arange(len(counts_N)), counts_N)
        other_E = ids_E != label_ids_N[owner_E]
        counts_N = np.bincount(owner_E[other_E], minlength=len(counts_N)).astype(np.int64)
        ids_E, logprobs_E = ids_E[other_E], logprobs_E[other_E]
    if counts_N.max(initial=0) > MOST_REQUESTED:
        raise CacheError(f"a position has more than {MOST_REQUESTED} requested entries")
    return counts_N, ids_E, requested_code(logprobs_E)


def new_requested(
    counts_N: NDArray[np.int64],
    ids_E: NDArray[np.int32],
    others: Sequence[tuple[NDArray[np.int64], NDArray[np.int32]]],
) -> int:
    """Return how many requested entries are in none of the other runs (counts and ids) there."""

    def keys(counts: NDArray[np.int64], ids: NDArray[np.int32]) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(counts), dtype=np.int64), counts) << 20 | ids

    there = np.concatenate([keys(*other) for other in others])
    return int((~np.isin(keys(counts_N, ids_E), there)).sum())


@dataclass(frozen=True, slots=True)
class Merged:
    """Entries of N positions with the requested ones among them."""

    counts_N: NDArray[np.int32]
    ids_E: NDArray[np.int32]
    logprobs_E: NDArray[np.float32]
    inclusion_E: NDArray[np.float32] | None
    requested_E: NDArray[np.bool_]
    """Which are there for having been asked for: no label, and not always kept."""


def merged(
    counts_N: NDArray[np.int32],
    ids_E: NDArray[np.int32],
    logprobs_E: NDArray[np.float32],
    inclusion_E: NDArray[np.float32] | None,
    *,
    always_kept_N: NDArray[np.int64],
    requested_N: NDArray[np.int64],
    requested_ids: NDArray[np.int32],
    requested_codes: NDArray[np.uint8],
) -> Merged:
    """Merge requested entries into decoded ones; each token counts once, known exactly.

    A sampled entry that was requested gives way to its exact value: the sampled entries that are
    left estimate the sum over all tokens that are neither always kept nor requested, each with the
    inclusion probability that it had. Of an always-kept one the finer requested value is taken
    under an inclusion rule; a top-k keeps its own, which with the tail sum to 1.

    Args:
        counts_N: entries of each position.
        ids_E: under an inclusion rule label, always-kept run, sampled run; else one run; ascending.
        logprobs_E: of the entries.
        inclusion_E: None: no inclusion rule.
        always_kept_N: entries of the always-kept run.
        requested_N: requested entries of each position.
        requested_ids: ascending within a position.
        requested_codes: of their log p.
    """
    from pipeline.cache.codec.kernels_requested import merge_runs

    total = len(ids_E) + len(requested_ids)
    out_ids, out_logprobs = np.empty(total, np.int32), np.empty(total, np.float32)
    out_inclusion, out_requested = np.ones(total, np.float32), np.zeros(total, np.bool_)
    out_N = np.empty(len(counts_N), np.int32)
    has_rule = inclusion_E is not None
    size = merge_runs(
        int(has_rule), counts_N.astype(np.int64), always_kept_N, ids_E, logprobs_E,
        inclusion_E if inclusion_E is not None else np.ones(len(ids_E), np.float32),
        requested_N, requested_ids, requested_values()[requested_codes],
        out_N, out_ids, out_logprobs, out_inclusion, out_requested,
    )  # fmt: skip
    return Merged(
        out_N,
        out_ids[:size],
        out_logprobs[:size],
        out_inclusion[:size] if has_rule else None,
        out_requested[:size],
    )


def _concatenated(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
