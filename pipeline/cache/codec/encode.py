"""Targets to quantised integers, and integers to the byte columns of codec "ranked".

Legend: S rows, N supervised positions of all of them, E entries (e: of one kind), G temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.largest import LARGEST_COLUMN, packed_places
from pipeline.cache.codec.requested import joined_requested
from pipeline.cache.codec.spec import STREAMS, VALUE_STREAMS, Blobs, CodecSpec, CodedRows, Run
from pipeline.cache.codec.targets import SparseTargets
from pipeline.cache.codec.written import WRITTEN_COLUMNS, written_codes
from pipeline.errors import CacheError

__all__ = ["pack", "quantise"]


def quantise(
    targets: Sequence[SparseTargets],
    tails: Sequence[NDArray[np.float32]],
    dither_N: NDArray[np.float32],
    spec: CodecSpec,
) -> CodedRows:
    """Quantise the targets of S rows.

    Args:
        targets: of each row; under an inclusion rule with the runs that `SparseTargets` describes.
        tails: mass outside the always-kept entries; stored where there is no inclusion rule.
        dither_N: of each position, from `noise.dither`.
        spec: the codec.

    Raises:
        CacheError: ids out of range, numbers that are not finite, counts above 65,535, or columns
            that differ in length.
    """
    positions_S = np.array([target.num_positions for target in targets], np.int64)
    counts_N = _joined([target.counts_N for target in targets], np.int64)
    ids_E = _joined([target.token_ids_E for target in targets], np.int32)
    logprobs_E = _joined([target.logprobs_E for target in targets], np.float32)
    if counts_N.sum() != ids_E.size or ids_E.size != logprobs_E.size:
        raise CacheError("counts, ids and log-probs of a sequence differ in length")
    if ids_E.size and (ids_E.min() < 0 or ids_E.max() >= spec.vocab_size):
        raise CacheError(f"a token id is outside the vocabulary of {spec.vocab_size}")
    if not np.isfinite(logprobs_E).all():
        raise CacheError("a log-probability is not finite")
    if spec.rule is None:
        codes_E = spec.quantisation.always_kept_code(logprobs_E)
        always_kept = Run(counts_N, ids_E, codes_E)
        sampled = Run(0 * counts_N, ids_E[:0], codes_E[:0])
    else:
        if counts_N.size and counts_N.min() < 1:
            raise CacheError("a position of a sampled target lacks its label entry")
        inclusion_E = _joined([_inclusion(target) for target in targets], np.float32)
        if inclusion_E.size != ids_E.size:
            raise CacheError("counts, ids and log-probs of a sequence differ in length")
        always_kept, sampled = _apart(counts_N, ids_E, logprobs_E, inclusion_E, dither_N, spec)
    if max(always_kept.counts_N.max(initial=0), sampled.counts_N.max(initial=0)) > 0xFFFF:
        raise CacheError("a position has more than 65,535 entries")
    label_N, log_z_NG, entropy_NG, tail_N = _statistics(targets, tails, positions_S, dither_N, spec)
    written_N = written_codes(targets) if spec.written_logprobs else None
    requested = None
    if spec.requested_entries:
        starts_N = np.cumsum(counts_N) - counts_N
        label_ids_N = None if spec.rule is None else ids_E[starts_N]
        requested = Run(*joined_requested(targets, label_ids_N, spec.vocab_size))
    return CodedRows(
        positions_S, always_kept, sampled, label_N, log_z_NG, entropy_NG, tail_N, written_N,
        _largest(targets, counts_N, ids_E, spec) if spec.largest_known else None, requested,
    )  # fmt: skip


def pack(coded: CodedRows, order_V: NDArray[np.int32], spec: CodecSpec) -> dict[str, Blobs]:
    """Write integers as byte columns.

    Args:
        coded: S rows.
        order_V: the token of each rank.
        spec: the codec.

    Raises:
        CacheError: an id occurs twice at a position, or a likeliest token is not its largest
            always-kept entry.
    """
    positions_S = coded.positions_S
    rank_V = np.empty(spec.vocab_size, np.int32)
    rank_V[order_V] = np.arange(spec.vocab_size, dtype=np.int32)
    blobs = _write("always_kept", coded.always_kept, rank_V, positions_S)
    blobs |= _write("sampled", coded.sampled, rank_V, positions_S)
    sampled_N = coded.sampled.counts_N - expected_draws(coded.label_N, coded.always_kept, spec)
    if spec.tau_units:
        sampled_N = np.where(sampled_N < 0, -2 * sampled_N - 1, 2 * sampled_N)
    counts_KN = np.stack([coded.always_kept.counts_N, sampled_N])
    blobs["always_kept_counts"] = Blobs.of_lengths(_low(counts_KN[0]), positions_S)
    blobs["sampled_counts"] = Blobs.of_lengths(_low(counts_KN[1]), positions_S)
    blobs["counts_high"] = _high_counts(counts_KN >> 8, positions_S)
    blobs["label_logprob"] = Blobs.of_lengths(coded.label_N, positions_S)
    steps_GN = coded.log_z_NG.T.astype(np.int64) & 0xFFFF
    blobs["log_z"] = _stacked(_low(steps_GN), positions_S)
    blobs["log_z_high"] = _stacked(_low(steps_GN >> 8), positions_S)
    blobs["entropy"] = _stacked(coded.entropy_NG.T, positions_S)
    blobs["tail"] = Blobs.of_lengths(coded.tail_N, positions_S * (spec.rule is None))
    if coded.written_N is not None:
        for name, part_N in zip(
            WRITTEN_COLUMNS, (coded.written_N, coded.written_N >> 8), strict=True
        ):
            blobs[name] = Blobs.of_lengths(_low(part_N), positions_S)
    if coded.largest_N is not None:
        candidates = coded.candidates(spec)
        place_N = candidates.places(coded.largest_N)
        data, lengths_S = packed_places(place_N, candidates.shared_N(), positions_S)
        blobs[LARGEST_COLUMN] = Blobs.of_lengths(data, lengths_S)
    if coded.requested is not None:
        blobs |= _write("requested", coded.requested, rank_V, positions_S)
        blobs["requested_counts"] = Blobs.of_lengths(_low(coded.requested.counts_N), positions_S)
    return blobs


def expected_draws(
    label_N: NDArray[np.uint8], always_kept: Run, spec: CodecSpec
) -> NDArray[np.int64]:
    """Return the expected number of sampled entries, where one tau determines it; else 0."""
    from pipeline.cache.codec.kernels_targets import rest_units

    if not spec.tau_units:
        return np.zeros(len(label_N), np.int64)
    rest_N = rest_units(
        label_N, always_kept.codes_E, always_kept.counts_N, spec.quantisation.mass_units()
    )
    expected_N = (rest_N + spec.tau_units // 2) // spec.tau_units
    return expected_N.astype(np.int64, copy=False)


def _joined(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


def _largest(
    targets: Sequence[SparseTargets],
    counts_N: NDArray[np.int64],
    ids_E: NDArray[np.int32],
    spec: CodecSpec,
) -> NDArray[np.int32]:
    """Return the ids of the largest entries; -1 where that is the label of a sampled target."""
    parts = [target.largest_N for target in targets if target.largest_N is not None]
    largest_N = _joined(parts, np.int32)
    if len(parts) != len(targets) or len(largest_N) != len(counts_N):
        raise CacheError("a sequence without its likeliest tokens in a cache that has them")
    if spec.rule is None:
        return largest_N
    label_ids_N = ids_E[np.cumsum(counts_N) - counts_N]
    return np.where(largest_N == label_ids_N, -1, largest_N).astype(np.int32)


def _inclusion(target: SparseTargets) -> NDArray[np.float32]:
    if target.inclusion_E is None:
        raise CacheError(
            "targets without inclusion probabilities in a cache with an inclusion rule"
        )
    return target.inclusion_E


def _apart(
    counts_N: NDArray[np.int64],
    ids_E: NDArray[np.int32],
    logprobs_E: NDArray[np.float32],
    inclusion_E: NDArray[np.float32],
    dither_N: NDArray[np.float32],
    spec: CodecSpec,
) -> tuple[Run, Run]:
    """Return the always-kept entries without the label, which needs no id, and the sampled ones."""
    from pipeline.cache.codec.kernels_targets import take_apart

    kinds = [
        (np.empty_like(counts_N), np.empty_like(ids_E), np.empty_like(logprobs_E)) for _ in range(2)
    ]
    always_kept_e, sampled_e = take_apart(
        counts_N, ids_E, logprobs_E, inclusion_E, *kinds[0], *kinds[1]
    )  # fmt: skip
    (
        (always_kept_N, always_kept_ids, always_kept_logprobs),
        (sampled_N, sampled_ids, sampled_logprobs),
    ) = kinds
    sampled_codes_e = spec.quantisation.sampled_code(
        sampled_logprobs[:sampled_e], np.repeat(dither_N, sampled_N)
    )
    return (
        Run(
            always_kept_N,
            always_kept_ids[:always_kept_e],
            spec.quantisation.always_kept_code(always_kept_logprobs[:always_kept_e]),
        ),
        Run(sampled_N, sampled_ids[:sampled_e], sampled_codes_e),
    )


def _write(
    kind: str, run: Run, rank_V: NDArray[np.int32], positions_S: NDArray[np.int64]
) -> dict[str, Blobs]:
    """Return ids and values of one kind of entries, in ascending rank within a position."""
    from pipeline.cache.codec.kernels import sort_runs, write_runs

    ranks_e, codes_e = rank_V[run.ids_E], run.codes_E.copy()
    sort_runs(ranks_e, codes_e, run.counts_N)
    value_streams = VALUE_STREAMS if kind == "sampled" else 1
    symbols_CE = np.empty((STREAMS, len(ranks_e)), np.uint8)
    values_DE = np.zeros((value_streams, len(ranks_e)), np.uint8)
    bits = np.empty(3 * len(ranks_e) + len(positions_S), np.uint8)
    symbol_ends_CS = np.zeros((STREAMS, len(positions_S)), np.int64)
    value_ends_DS = np.zeros((value_streams, len(positions_S)), np.int64)
    bit_ends_S = np.zeros(len(positions_S), np.int64)
    twice = write_runs(
        ranks_e, codes_e, run.counts_N, positions_S, symbols_CE, symbol_ends_CS, bits, bit_ends_S,
        values_DE, value_ends_DS,
    )  # fmt: skip
    if twice >= 0:
        raise CacheError("a token id occurs twice at one position")
    blobs = {f"{kind}_bits": _ending(bits, bit_ends_S)}
    for stream in range(STREAMS):
        blobs[f"{kind}_ids_{stream}"] = _ending(symbols_CE[stream], symbol_ends_CS[stream])
    for stream in range(value_streams):
        name = f"{kind}_values_{stream}" if kind == "sampled" else f"{kind}_values"
        blobs[name] = _ending(values_DE[stream], value_ends_DS[stream])
    return blobs


def _ending(data: NDArray[np.uint8], ends_S: NDArray[np.int64]) -> Blobs:
    used = int(ends_S[-1]) if len(ends_S) else 0
    return Blobs(data[:used], np.concatenate([[0], ends_S]))


def _low(values: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    return (values & 0xFF).astype(np.uint8)


def _high_counts(high_KN: NDArray[np.int64], positions_S: NDArray[np.int64]) -> Blobs:
    """Return the high bytes of the always-kept counts, then of the sampled; empty if all are 0."""
    row_N = np.repeat(np.arange(len(positions_S)), positions_S)
    needed_S = np.zeros(len(positions_S), bool)
    needed_S[row_N[high_KN.any(axis=0)]] = True
    kept_N = needed_S[row_N]
    return _stacked(high_KN[:, kept_N].astype(np.uint8), positions_S * needed_S)


def _stacked(planes_PN: NDArray[np.uint8], positions_S: NDArray[np.int64]) -> Blobs:
    """Interleave P planes so that a row holds its part of each plane, one after the other."""
    count = len(planes_PN)
    if count <= 1:
        return Blobs.of_lengths(np.ascontiguousarray(planes_PN).reshape(-1), count * positions_S)
    ends_S = np.cumsum(positions_S)
    data = np.empty(planes_PN.size, np.uint8)
    begin_S = count * (ends_S - positions_S)
    # Place of byte (p, n): the row's start, p parts, and n's place within the row.
    row_N = np.repeat(np.arange(len(positions_S)), positions_S)
    within_N = np.arange(planes_PN.shape[1]) - (ends_S - positions_S)[row_N]
    for plane in range(count):
        data[begin_S[row_N] + plane * positions_S[row_N] + within_N] = planes_PN[plane]
    return Blobs.of_lengths(data, count * positions_S)


def _statistics(
    targets: Sequence[SparseTargets],
    tails: Sequence[NDArray[np.float32]],
    positions_S: NDArray[np.int64],
    dither_N: NDArray[np.float32],
    spec: CodecSpec,
) -> tuple[NDArray[np.uint8], NDArray[np.int16], NDArray[np.uint8], NDArray[np.uint8]]:
    quantisation = spec.quantisation
    temperatures = targets[0].temperatures if targets else (1.0,)
    others = [g for g, temperature in enumerate(temperatures) if temperature != 1.0]
    label_N = _joined([target.label_logprob_N for target in targets], np.float32)
    log_z = _joined([t.log_z_NG for t in targets], np.float32).reshape(-1, len(temperatures))
    entropy = _joined([t.entropy_NG for t in targets], np.float32).reshape(-1, len(temperatures))
    total = int(positions_S.sum())
    if not len(label_N) == len(log_z) == len(entropy) == total:
        raise CacheError("the statistics of a sequence differ in length from its positions")
    if not (np.isfinite(label_N).all() and np.isfinite(log_z).all() and np.isfinite(entropy).all()):
        raise CacheError("a statistic of the teacher is not finite")
    tail_N = _joined(list(tails), np.float64)
    if spec.rule is None and (len(tail_N) != total or not np.isfinite(tail_N).all()):
        raise CacheError("the tail masses of a sequence differ in length from its positions")
    return (
        quantisation.always_kept_code(label_N),
        quantisation.log_z_code(log_z[:, others]),
        quantisation.entropy_code(entropy, dither_N[:, None]),
        quantisation.tail_code(tail_N) if spec.rule is None else np.zeros(0, np.uint8),
    )
