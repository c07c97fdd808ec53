"""Byte columns of codec "ranked" to integers and to targets; every byte is checked.

Legend: S rows, N supervised positions of all of them, E entries (e: of one kind), G temperatures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.encode import expected_draws
from pipeline.cache.codec.largest import LARGEST_COLUMN, top_k_logprobs, unpacked_places
from pipeline.cache.codec.requested import merged
from pipeline.cache.codec.spec import STREAMS, VALUE_STREAMS, Blobs, CodecSpec, CodedRows, Run
from pipeline.cache.codec.targets import SparseTargets
from pipeline.cache.codec.written import WRITTEN_COLUMNS, written_values
from pipeline.errors import CacheError
from pipeline.sampling.inclusion import MOST_INCLUSION

__all__ = ["to_targets", "unpack"]

_LEAST = 1e-30
"""No entry has a smaller inclusion probability, so 1 / pi is finite."""


def unpack(
    columns: Mapping[str, Blobs],
    positions_S: NDArray[np.int64],
    order_V: NDArray[np.int32],
    spec: CodecSpec,
    temperatures: tuple[float, ...],
) -> CodedRows:
    """Read the integers of S rows.

    Args:
        columns: as `pack` returned them.
        positions_S: supervised positions of each row.
        order_V: the token of each rank.
        spec: the codec.
        temperatures: the grid.

    Raises:
        CacheError: the bytes cannot have been written by the encoder.
    """
    label_N, log_z_NG, entropy_NG = _unpack_statistics(columns, positions_S, temperatures)
    _expect(columns["tail"], positions_S * (spec.rule is None), "tail")
    _expect(columns["always_kept_counts"], positions_S, "always_kept_counts")
    _expect(columns["sampled_counts"], positions_S, "sampled_counts")
    high_KN = _high_counts(columns["counts_high"], positions_S)
    always_kept_N = columns["always_kept_counts"].data + (high_KN[0] << 8)
    always_kept = _read("always_kept", columns, always_kept_N, positions_S, order_V)
    sampled_N = columns["sampled_counts"].data + (high_KN[1] << 8)
    if spec.tau_units:
        sampled_N = np.where(sampled_N & 1, -(sampled_N + 1 >> 1), sampled_N >> 1)
        sampled_N = sampled_N + expected_draws(label_N, always_kept, spec)
    if sampled_N.size and (sampled_N.min() < 0 or sampled_N.max() > 0xFFFF):
        raise CacheError("a position has an impossible number of sampled entries")
    if spec.rule is None and sampled_N.any():
        raise CacheError("sampled entries in a cache without an inclusion rule")
    sampled = _read("sampled", columns, sampled_N, positions_S, order_V)
    coded = CodedRows(
        positions_S, always_kept, sampled, label_N, log_z_NG, entropy_NG, columns["tail"].data,
        _unpack_written(columns, positions_S) if spec.written_logprobs else None, None,
        _unpack_requested(columns, positions_S, order_V) if spec.requested_entries else None,
    )  # fmt: skip
    if not spec.largest_known:
        return coded
    candidates, blobs = coded.candidates(spec), columns[LARGEST_COLUMN]
    places = unpacked_places(blobs.data, blobs.lengths_S, candidates.shared_N(), positions_S)
    return replace(coded, largest_N=candidates.at(places))


def _unpack_requested(
    columns: Mapping[str, Blobs], positions_S: NDArray[np.int64], order_V: NDArray[np.int32]
) -> Run:
    """Read the run of requested entries."""
    _expect(columns["requested_counts"], positions_S, "requested_counts")
    counts_N = columns["requested_counts"].data.astype(np.int64)
    return _read("requested", columns, counts_N, positions_S, order_V)


def _unpack_written(
    columns: Mapping[str, Blobs], positions_S: NDArray[np.int64]
) -> NDArray[np.uint16]:
    """Read the codes of the written log-probs."""
    for name in WRITTEN_COLUMNS:
        _expect(columns[name], positions_S, name)
    low_N, high_N = (columns[name].data.astype(np.uint16) for name in WRITTEN_COLUMNS)
    return low_N | high_N << np.uint16(8)


def _unpack_statistics(
    columns: Mapping[str, Blobs], positions_S: NDArray[np.int64], temperatures: tuple[float, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.int16], NDArray[np.uint8]]:
    """Read only the codes of the labels [N], of log Z [N, G - 1] and of the entropies [N, G].

    Raises:
        CacheError: the bytes cannot have been written by the encoder.
    """
    grid = len(temperatures)
    _expect(columns["label_logprob"], positions_S, "label_logprob")
    _expect(columns["log_z"], (grid - 1) * positions_S, "log_z")
    _expect(columns["log_z_high"], (grid - 1) * positions_S, "log_z_high")
    _expect(columns["entropy"], grid * positions_S, "entropy")
    low_GN = _unstacked(columns["log_z"], positions_S, grid - 1).astype(np.uint16)
    high_GN = _unstacked(columns["log_z_high"], positions_S, grid - 1).astype(np.uint16)
    entropy_GN = _unstacked(columns["entropy"], positions_S, grid)
    return columns["label_logprob"].data, (low_GN | high_GN << 8).view(np.int16).T, entropy_GN.T


def to_targets(
    coded: CodedRows,
    label_ids_N: NDArray[np.int32],
    dither_N: NDArray[np.float32],
    spec: CodecSpec,
    temperatures: tuple[float, ...],
) -> list[SparseTargets]:
    """Decode the integers of S rows to targets.

    Args:
        coded: the rows.
        label_ids_N: the supervised tokens of all rows, within the vocabulary.
        dither_N: of each position, from `noise.dither`.
        spec: the codec.
        temperatures: the grid.

    Raises:
        CacheError: an entry that the inclusion rule cannot have sampled.
    """
    quantisation = spec.quantisation
    always_kept_K = quantisation.always_kept_values()
    log_z_NG = np.zeros((len(coded.label_N), len(temperatures)), np.float32)
    others = [g for g, temperature in enumerate(temperatures) if temperature != 1.0]
    log_z_NG[:, others] = coded.log_z_NG * np.float32(quantisation.log_z_step)
    entropy_NG = quantisation.entropy_value(coded.entropy_NG, dither_N[:, None])
    label_N = always_kept_K[coded.label_N]
    written_N = None if coded.written_N is None else written_values(coded.written_N)
    inclusion_E = None
    if spec.rule is None:
        counts_N = coded.always_kept.counts_N.astype(np.int32)
        ids_E = coded.always_kept.ids_E
        tail_N = quantisation.tail_values()[coded.tail_N]
        logprobs_E = top_k_logprobs(
            coded.always_kept.codes_E, counts_N, tail_N, always_kept_K,
            quantisation.always_kept_step,
        )  # fmt: skip
    else:
        counts_N = (coded.always_kept.counts_N + coded.sampled.counts_N + 1).astype(np.int32)
        ids_E, logprobs_E, inclusion_E = _assembled(
            coded, label_ids_N, dither_N, log_z_NG, spec, temperatures
        )
    largest_N = coded.largest_N
    if largest_N is not None and spec.rule is not None:
        largest_N = np.where(largest_N < 0, label_ids_N, largest_N).astype(np.int32)
    requested_E = None
    if coded.requested is not None:
        whole = merged(
            counts_N, ids_E, logprobs_E, inclusion_E,
            always_kept_N=coded.always_kept.counts_N, requested_N=coded.requested.counts_N,
            requested_ids=coded.requested.ids_E, requested_codes=coded.requested.codes_E,
        )  # fmt: skip
        counts_N, ids_E, logprobs_E = whole.counts_N, whole.ids_E, whole.logprobs_E
        inclusion_E, requested_E = whole.inclusion_E, whole.requested_E
    ends_S = np.cumsum(coded.positions_S)
    ends_N = np.concatenate([[0], np.cumsum(counts_N, dtype=np.int64)])
    rows = []
    begin = 0
    for end, entry_begin, entry_end in zip(
        ends_S.tolist(),
        ends_N[ends_S - coded.positions_S].tolist(),
        ends_N[ends_S].tolist(),
        strict=True,
    ):
        rows.append(
            SparseTargets(
                counts_N=counts_N[begin:end],
                token_ids_E=ids_E[entry_begin:entry_end],
                logprobs_E=logprobs_E[entry_begin:entry_end],
                inclusion_E=None if inclusion_E is None else inclusion_E[entry_begin:entry_end],
                temperatures=temperatures,
                log_z_NG=log_z_NG[begin:end],
                entropy_NG=entropy_NG[begin:end],
                label_logprob_N=label_N[begin:end],
                sampled_step=0.0 if spec.rule is None else quantisation.sampled_step,
                written_logprob_N=None if written_N is None else written_N[begin:end],
                largest_N=None if largest_N is None else largest_N[begin:end],
                requested_E=None if requested_E is None else requested_E[entry_begin:entry_end],
            )
        )
        begin = end
    return rows


def _assembled(
    coded: CodedRows,
    label_ids_N: NDArray[np.int32],
    dither_N: NDArray[np.float32],
    log_z_NG: NDArray[np.float32],
    spec: CodecSpec,
    temperatures: tuple[float, ...],
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """Return ids, log p and inclusion of a sampled target's entries.

    pi = sqrt(sum_g (p^(1/T_g) / (Z_g tau_g))^2) is a product of a factor of the position and one of
    the code, since log p = -step (k + d): one exponential per position, none per entry.
    """
    from pipeline.cache.codec.kernels_targets import assemble

    rule, step = spec.rule, spec.quantisation.sampled_step
    assert rule is not None
    used = [
        (g, temperature, tau)
        for g, (temperature, tau) in enumerate(zip(temperatures, rule.taus, strict=True))
        if tau
    ]
    dither = dither_N.astype(np.float64)
    with np.errstate(over="ignore"):  # of damaged log Z; limited to the largest pi
        scale_GN = [
            np.exp(-2 * (dither * step / temperature + log_z_NG[:, g])) / tau**2
            for g, temperature, tau in used
        ]
    square_GK = [np.exp(-2 * step * np.arange(256) / temperature) for _, temperature, _ in used]
    total = coded.num_scheme_entries(spec)
    ids_E, logprobs_E = np.empty(total, np.int32), np.empty(total, np.float32)
    inclusion_E = np.empty(total, np.float32)
    damaged = assemble(
        label_ids_N, coded.label_N,
        coded.always_kept.counts_N, coded.always_kept.ids_E, coded.always_kept.codes_E,
        coded.sampled.counts_N, coded.sampled.ids_E, coded.sampled.codes_E,
        dither_N, spec.quantisation.always_kept_values(), np.float32(step),
        np.stack(scale_GN, axis=1), np.stack(square_GK), MOST_INCLUSION, _LEAST,
        ids_E, logprobs_E, inclusion_E,
    )  # fmt: skip
    if damaged >= 0:
        raise CacheError(f"an entry of supervised position {damaged} cannot have been sampled")
    return ids_E, logprobs_E, inclusion_E


def _expect(blobs: Blobs, lengths_S: NDArray[np.int64], name: str) -> None:
    if not np.array_equal(blobs.lengths_S, lengths_S):
        row = int(np.flatnonzero(blobs.lengths_S != lengths_S)[0])
        raise CacheError(
            f"column {name} of row {row} holds {int(blobs.lengths_S[row])} bytes, "
            f"not {int(lengths_S[row])}"
        )


def _high_counts(blobs: Blobs, positions_S: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the high bytes of both counts [2, N]; zeros for a row that stores none."""
    needed_S = blobs.lengths_S > 0
    _expect(blobs, 2 * positions_S * needed_S, "counts_high")
    high_KN = np.zeros((2, int(positions_S.sum())), np.int64)
    if needed_S.any():
        high_KN[:, np.repeat(needed_S, positions_S)] = _unstacked(blobs, positions_S * needed_S, 2)
    return high_KN


def _unstacked(blobs: Blobs, positions_S: NDArray[np.int64], planes: int) -> NDArray[np.uint8]:
    """Return uint8 [P, N], the inverse of `_stacked`."""
    if planes <= 1:
        return blobs.data[None] if planes else np.zeros((0, int(positions_S.sum())), np.uint8)
    firsts_S = np.cumsum(positions_S) - positions_S
    begin_N = np.repeat(blobs.starts[:-1] - firsts_S, positions_S)
    begin_N += np.arange(len(begin_N))
    step_N = np.repeat(positions_S, positions_S)
    return np.stack([blobs.data[begin_N + plane * step_N] for plane in range(planes)])


def _read(
    kind: str,
    columns: Mapping[str, Blobs],
    counts_N: NDArray[np.int64],
    positions_S: NDArray[np.int64],
    order_V: NDArray[np.int32],
) -> Run:
    """Return one kind of entries, by ascending id within a position."""
    from pipeline.cache.codec.kernels import PADDING, READ_FAULTS, read_runs

    sums = np.concatenate([[0], np.cumsum(counts_N)])
    ends_S = np.cumsum(positions_S)
    per_row_S = sums[ends_S] - sums[ends_S - positions_S]
    ids = [columns[f"{kind}_ids_{stream}"] for stream in range(STREAMS)]
    values = [columns[f"{kind}_values"]] if kind != "sampled" else [
        columns[f"sampled_values_{stream}"] for stream in range(VALUE_STREAMS)
    ]  # fmt: skip
    # Before anything of that size is allocated: there must be as many symbols as the counts say.
    if not np.array_equal(sum(blob.lengths_S for blob in ids), per_row_S):
        raise CacheError(f"the number of {kind} ids differs from the counts")
    bits = columns[f"{kind}_bits"]
    if not any(len(blob.data) for blob in (*ids, *values, bits)):
        return Run(counts_N, np.zeros(0, np.int32), np.zeros(0, np.uint8))
    symbols, symbol_starts_CS = _joined(ids)
    codes, value_starts_DS = _joined(values)
    ids_e = np.empty(int(sums[-1]), np.int32)
    codes_e = np.empty(len(ids_e), np.uint8)
    fault, row = read_runs(
        symbols, symbol_starts_CS, np.concatenate([bits.data, np.zeros(PADDING, np.uint8)]),
        bits.starts, codes, value_starts_DS, counts_N, positions_S, order_V, ids_e, codes_e,
    )  # fmt: skip
    if fault:
        raise CacheError(f"the {kind} ids of row {row} are damaged: {READ_FAULTS[fault]}")
    return Run(counts_N, ids_e, codes_e)


def _joined(blobs: list[Blobs]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the bytes of all streams, and each row's offsets in them [C, S + 1]."""
    bases = np.cumsum([0, *(len(blob.data) for blob in blobs[:-1])])
    starts = np.stack([blob.starts + base for blob, base in zip(blobs, bases, strict=True)])
    return np.concatenate([blob.data for blob in blobs]), starts
