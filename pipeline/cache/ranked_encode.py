"""Targets of many rows to the byte columns of codec "ranked".

Legend: S rows, N counted positions of all of them, E entries (e: of one kind), G temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.ranked import Blobs, RankedSpec
from pipeline.cache.sparse import SparseTargets
from pipeline.errors import CacheError

__all__ = ["encode_targets"]


def encode_targets(
    targets: Sequence[SparseTargets],
    tails: Sequence[NDArray[np.float32]],
    dither_N: NDArray[np.float32],
    spec: RankedSpec,
) -> dict[str, Blobs]:
    """Encode the targets of S rows.

    Args:
        targets: of each row; under a law with the runs that `SparseTargets` describes.
        dither_N: of each position, from `counter.dither`.
        tails: mass outside the certain entries; stored where there is no law.
        spec: the codec.

    Raises:
        CacheError: ids out of range or twice at a position, numbers that are not finite, counts
            above 65,535, or columns that differ in length.
    """
    positions_S = np.array([target.num_positions for target in targets], np.int64)
    counts_N = _joined([target.counts_N for target in targets], np.int64)
    ids_E = _joined([target.token_ids_E for target in targets], np.int64)
    logprobs_E = _joined([target.logprobs_E for target in targets], np.float32)
    if counts_N.sum() != ids_E.size or ids_E.size != logprobs_E.size:
        raise CacheError("counts, ids and log-probs of a sequence differ in length")
    if ids_E.size and (ids_E.min() < 0 or ids_E.max() >= spec.vocab_size):
        raise CacheError(f"a token id is outside the vocabulary of {spec.vocab_size}")
    if not np.isfinite(logprobs_E).all():
        raise CacheError("a log-probability is not finite")
    certain_E = np.ones(len(ids_E), bool)
    if spec.law is not None:
        inclusion_E = _joined([_inclusion(target) for target in targets], np.float32)
        certain_E = inclusion_E >= 1
    owner_E = np.repeat(np.arange(len(counts_N)), counts_N)
    gold_E = np.zeros(len(ids_E), bool)
    if spec.law is not None:
        if counts_N.size and counts_N.min() < 1:
            raise CacheError("a position of a sampled target lacks its gold entry")
        gold_E[np.cumsum(counts_N) - counts_N] = True
    columns: dict[str, Blobs] = {}
    counts: dict[str, NDArray[np.int64]] = {}
    for kind, chosen_E in (("certain", certain_E & ~gold_E), ("drawn", ~certain_E)):
        counts[kind] = np.bincount(owner_E[chosen_E], minlength=len(counts_N))
        if counts[kind].max(initial=0) > 0xFFFF:
            raise CacheError("a position has more than 65,535 entries")
        levels_e = (
            spec.grids.certain_level(logprobs_E[chosen_E])
            if kind == "certain"
            else spec.grids.drawn_level(logprobs_E[chosen_E], dither_N[owner_E[chosen_E]])
        )
        columns |= _runs(kind, ids_E[chosen_E], levels_e, counts[kind], positions_S, spec)
    columns["counts"] = _planes([counts["certain"], counts["drawn"]], positions_S)
    columns |= _statistics(targets, tails, positions_S, spec)
    return columns


def _joined(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def _inclusion(target: SparseTargets) -> NDArray[np.float32]:
    if target.inclusion_E is None:
        raise CacheError("a sampled cache was handed targets without inclusion probabilities")
    return target.inclusion_E


def _per_row(values_N: NDArray[np.int64], positions_S: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum over the positions of each row."""
    sums = np.concatenate([[0], np.cumsum(values_N)])
    ends_S = np.cumsum(positions_S)
    per_row_S: NDArray[np.int64] = sums[ends_S] - sums[ends_S - positions_S]
    return per_row_S


def _blobs(data: NDArray[np.uint8], lengths_S: NDArray[np.int64]) -> Blobs:
    return Blobs(data, np.concatenate([[0], np.cumsum(lengths_S)]).astype(np.int64))


def _runs(
    kind: str,
    ids_e: NDArray[np.int64],
    levels_e: NDArray[np.uint8],
    counts_N: NDArray[np.int64],
    positions_S: NDArray[np.int64],
    spec: RankedSpec,
) -> dict[str, Blobs]:
    """Return ids and values of one kind of entries, in ascending rank within a position."""
    from pipeline.cache.kernels import sort_runs, write_runs

    ranks_e = ids_e if spec.rank_V is None else spec.rank_V[ids_e].astype(np.int64)
    ranks_e, levels_e = ranks_e.copy(), levels_e.copy()
    sort_runs(ranks_e, levels_e, counts_N)
    classes_e = np.empty(len(ranks_e), np.uint8)
    bits = np.empty(3 * len(ranks_e) + len(positions_S), np.uint8)
    ends_S = np.zeros(len(positions_S), np.int64)
    twice = write_runs(ranks_e, counts_N, positions_S, classes_e, bits, ends_S)
    if twice >= 0:
        raise CacheError("a token id stands twice at one position")
    used = int(ends_S[-1]) if len(ends_S) else 0
    per_row_S = _per_row(counts_N, positions_S)
    return {
        f"{kind}_ids": _blobs(classes_e, per_row_S),
        f"{kind}_bits": Blobs(bits[:used], np.concatenate([[0], ends_S])),
        f"{kind}_values": _blobs(levels_e, per_row_S),
    }


def _planes(columns: list[NDArray[np.int64]], positions_S: NDArray[np.int64]) -> Blobs:
    """Lay 16-bit numbers out, row by row: of each column its low bytes, then its high bytes."""
    planes = [part for column in columns for part in (column & 0xFF, column >> 8)]
    return _stacked(np.stack(planes).astype(np.uint8), positions_S)


def _stacked(planes_PN: NDArray[np.uint8], positions_S: NDArray[np.int64]) -> Blobs:
    """Lay P planes out so that a row holds its part of each plane, one after the other."""
    count = len(planes_PN)
    ends_S = np.cumsum(positions_S)
    data = np.empty(planes_PN.size, np.uint8)
    begin_S = count * (ends_S - positions_S)
    # Place of byte (p, n): the row's begin, p whole parts, and n's place within the row.
    row_N = np.repeat(np.arange(len(positions_S)), positions_S)
    within_N = np.arange(planes_PN.shape[1]) - (ends_S - positions_S)[row_N]
    for plane in range(count):
        data[begin_S[row_N] + plane * positions_S[row_N] + within_N] = planes_PN[plane]
    return _blobs(data, count * positions_S)


def _statistics(
    targets: Sequence[SparseTargets],
    tails: Sequence[NDArray[np.float32]],
    positions_S: NDArray[np.int64],
    spec: RankedSpec,
) -> dict[str, Blobs]:
    grids = spec.grids
    temperatures = targets[0].temperatures if targets else (1.0,)
    others = [g for g, temperature in enumerate(temperatures) if temperature != 1.0]
    gold_N = _joined([target.gold_logprob_N for target in targets], np.float64)
    log_z = _joined([t.log_z_NG for t in targets], np.float64).reshape(-1, len(temperatures))
    entropy = _joined([t.entropy_NG for t in targets], np.float64).reshape(-1, len(temperatures))
    total = int(positions_S.sum())
    if not len(gold_N) == len(log_z) == len(entropy) == total:
        raise CacheError("the statistics of a sequence differ in length from its positions")
    if not (np.isfinite(gold_N).all() and np.isfinite(log_z).all() and np.isfinite(entropy).all()):
        raise CacheError("a statistic of the teacher is not finite")
    steps = grids.log_z_level(log_z[:, others]).astype(np.int64) & 0xFFFF
    tail_N = _joined(list(tails), np.float64)
    if spec.law is None and len(tail_N) != total:
        raise CacheError("the tail masses of a sequence differ in length from its positions")
    return {
        "gold": _blobs(grids.certain_level(gold_N), positions_S),
        "log_z": _planes(list(steps.T), positions_S)
        if others
        else _blobs(np.zeros(0, np.uint8), 0 * positions_S),
        "entropy": _stacked(grids.entropy_level(entropy).T.copy(), positions_S),
        "tail": _blobs(grids.tail_level(tail_N), positions_S)
        if spec.law is None
        else _blobs(np.zeros(0, np.uint8), 0 * positions_S),
    }
