"""The byte columns of codec "ranked" back to targets, many rows at once; trusts no byte.

Legend: S rows, N counted positions of all of them, E entries (e: of one kind), G temperatures.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec import restore_largest
from pipeline.cache.law import SamplingLaw
from pipeline.cache.ranked import Blobs, RankedSpec
from pipeline.cache.sparse import SparseTargets
from pipeline.errors import CacheError

__all__ = ["decode_targets"]


def decode_targets(
    columns: Mapping[str, Blobs],
    positions_S: NDArray[np.int64],
    gold_ids_N: NDArray[np.int32],
    dither_N: NDArray[np.float32],
    spec: RankedSpec,
    temperatures: tuple[float, ...],
) -> list[SparseTargets]:
    """Decode S rows at once.

    Args:
        columns: as `encode_targets` returned them.
        positions_S: counted positions of each row.
        gold_ids_N: the counted tokens of all rows.
        dither_N: of each position, from `counter.dither`.
        spec: the codec.
        temperatures: the grid.

    Raises:
        CacheError: the bytes cannot have been written by the encoder.
    """
    from pipeline.cache.kernels import place

    total, grid = int(positions_S.sum()), len(temperatures)
    _expect(columns["counts"], 4 * positions_S, "counts")
    _expect(columns["gold"], positions_S, "gold")
    _expect(columns["log_z"], 2 * (grid - 1) * positions_S, "log_z")
    _expect(columns["entropy"], grid * positions_S, "entropy")
    _expect(columns["tail"], positions_S if spec.law is None else 0 * positions_S, "tail")
    low_c, high_c, low_d, high_d = _unstacked(columns["counts"], positions_S, 4).astype(np.int64)
    certain_N, drawn_N = low_c | high_c << 8, low_d | high_d << 8
    if spec.law is None and drawn_N.any():
        raise CacheError("drawn entries in a cache that draws none")
    certain_e, certain_levels_e = _read_kind(columns, "certain", certain_N, positions_S, spec)
    drawn_e, drawn_levels_e = _read_kind(columns, "drawn", drawn_N, positions_S, spec)
    at_S = np.cumsum(positions_S) - positions_S
    log_z_NG = _read_log_z(columns["log_z"], positions_S, temperatures, spec)
    entropy_GN = _unstacked(columns["entropy"], positions_S, grid)
    entropy_NG = entropy_GN.T.astype(np.float32) * np.float32(spec.grids.entropy_step)
    gold_N = spec.grids.certain_levels()[columns["gold"].data]
    with_gold = spec.law is not None
    counts_N = (certain_N + drawn_N + with_gold).astype(np.int32)
    ids_E = np.empty(int(counts_N.sum()), np.int32)
    logprobs_E = np.empty(len(ids_E), np.float32)
    inclusion_E = np.ones(len(ids_E), np.float32) if with_gold else None
    begin_N = np.cumsum(counts_N, dtype=np.int64) - counts_N
    if with_gold:
        ids_E[begin_N], logprobs_E[begin_N] = gold_ids_N, gold_N
        begin_N = begin_N + 1
    certain_values_e = spec.grids.certain_levels()[certain_levels_e]
    place(begin_N, certain_N, certain_e, certain_values_e, ids_E, logprobs_E)
    if spec.law is not None:
        assert inclusion_E is not None
        first_N = begin_N + certain_N
        values_e = spec.grids.drawn_value(drawn_levels_e, np.repeat(dither_N, drawn_N))
        place(first_N, drawn_N, drawn_e, values_e, ids_E, logprobs_E)
        _fill_inclusion(first_N, drawn_N, logprobs_E, inclusion_E, log_z_NG, spec.law)
    else:
        tail_N = spec.grids.tail_levels()[columns["tail"].data]
        restore_largest(logprobs_E, counts_N, tail_N, spec.grids.certain_step)
    ends_S = np.cumsum(counts_N, dtype=np.int64)[at_S + positions_S - 1] if total else at_S
    bias = None if spec.law is None else tuple(map(spec.grids.drawn_log_bias, temperatures))
    rows = []
    begin_entry = 0
    for row, count in enumerate(positions_S.tolist()):
        first = int(at_S[row])
        some = slice(first, first + count)
        end_entry = int(ends_S[row]) if count else begin_entry
        entries = slice(begin_entry, end_entry)
        rows.append(
            SparseTargets(
                counts_N=counts_N[some],
                token_ids_E=ids_E[entries],
                logprobs_E=logprobs_E[entries],
                inclusion_E=None if inclusion_E is None else inclusion_E[entries],
                temperatures=temperatures,
                log_z_NG=log_z_NG[some],
                entropy_NG=entropy_NG[some],
                gold_logprob_N=gold_N[some],
                drawn_log_bias=bias,
            )
        )
        begin_entry = end_entry
    return rows


def _expect(blobs: Blobs, lengths_S: NDArray[np.int64], name: str) -> None:
    if not np.array_equal(blobs.lengths_S, lengths_S):
        row = int(np.flatnonzero(blobs.lengths_S != lengths_S)[0])
        raise CacheError(
            f"column {name} of row {row} holds {int(blobs.lengths_S[row])} bytes, "
            f"not {int(lengths_S[row])}"
        )


def _unstacked(blobs: Blobs, positions_S: NDArray[np.int64], planes: int) -> NDArray[np.uint8]:
    """Return uint8 [P, N] of what `_stacked` laid out."""
    ends_S = np.cumsum(positions_S)
    row_N = np.repeat(np.arange(len(positions_S)), positions_S)
    within_N = np.arange(len(row_N)) - (ends_S - positions_S)[row_N]
    begin_N = blobs.starts[:-1][row_N] + within_N
    step_N = positions_S[row_N]
    return np.stack([blobs.data[begin_N + plane * step_N] for plane in range(planes)])


def _read_kind(
    columns: Mapping[str, Blobs],
    kind: str,
    counts_N: NDArray[np.int64],
    positions_S: NDArray[np.int64],
    spec: RankedSpec,
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Return ids and stored levels of one kind of entries."""
    from pipeline.cache.kernels import PADDING, read_runs

    sums = np.concatenate([[0], np.cumsum(counts_N)])
    ends_S = np.cumsum(positions_S)
    per_row_S = sums[ends_S] - sums[ends_S - positions_S]
    classes, bits = columns[f"{kind}_ids"], columns[f"{kind}_bits"]
    # Before anything of that size is allocated: as many symbols must be there as are announced.
    _expect(classes, per_row_S, f"{kind}_ids")
    _expect(columns[f"{kind}_values"], per_row_S, f"{kind}_values")
    ranks_e = np.empty(int(sums[-1]), np.int32)
    padded = np.concatenate([bits.data, np.zeros(PADDING, np.uint8)])
    damaged = read_runs(
        classes.data, padded, bits.starts, counts_N, positions_S, spec.vocab_size, ranks_e
    )
    if damaged >= 0:
        raise CacheError(f"the {kind} ids of row {damaged} are damaged")
    ids_e = ranks_e if spec.order_V is None else spec.order_V[ranks_e]
    return ids_e, columns[f"{kind}_values"].data


def _read_log_z(
    blobs: Blobs, positions_S: NDArray[np.int64], temperatures: tuple[float, ...], spec: RankedSpec
) -> NDArray[np.float32]:
    """Return log Z, 0 at T = 1, which is not stored."""
    others = [g for g, temperature in enumerate(temperatures) if temperature != 1.0]
    log_z_NG = np.zeros((int(positions_S.sum()), len(temperatures)), np.float32)
    if others:
        planes = _unstacked(blobs, positions_S, 2 * len(others)).astype(np.int32)
        steps = (planes[0::2] | planes[1::2] << 8).astype(np.uint16).view(np.int16)
        log_z_NG[:, others] = steps.T.astype(np.float32) * np.float32(spec.grids.log_z_step)
    return log_z_NG


def _fill_inclusion(
    first_N: NDArray[np.int64],
    drawn_N: NDArray[np.int64],
    logprobs_E: NDArray[np.float32],
    inclusion_E: NDArray[np.float32],
    log_z_NG: NDArray[np.float32],
    law: SamplingLaw,
) -> None:
    """Write the law's probability of every drawn entry."""
    from pipeline.cache.kernels import places

    where_e = places(first_N, drawn_N)
    log_z_eG = np.repeat(log_z_NG, drawn_N, axis=0)
    inclusion_E[where_e] = law.inclusion(logprobs_E[where_e], log_z_eG)
