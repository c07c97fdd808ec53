"""Bytes of other codings of sampled targets' ids, compared with the codec's.

`make bench-codec ARGS=--tried`. The entries are the same for all, on the same rows; ids are most of
a target's bytes. Sizes are as written (Parquet with zstd) unless a line says otherwise.
Entropies are lower bounds: by the symbols' frequencies, without a table and a coder's overhead.

Legend: N supervised positions, E entries of all runs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from numpy.typing import NDArray

from pipeline.cache.codec.arrow import Heads, coded_table, quantised
from pipeline.cache.codec.encode import pack
from pipeline.cache.codec.spec import (
    COLUMNS,
    Blobs,
    CodecSpec,
    CodedRows,
    frequency_classes,
    order_of_classes,
)
from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.parquet import parquet_bytes
from tests.bench.fidelity_cache import column_sizes

__all__ = ["tried"]

_LAGS = 4
"""Number of earlier positions whose tokens are candidates."""
_DICTIONARY = 112_640
_LEVEL = 3


@dataclass(frozen=True, slots=True)
class Ids:
    """All runs of a shard, one after the other: first the always-kept ones of all positions, then
    the sampled ones."""

    ids_E: NDArray[np.int64]
    """By ascending id within a run."""
    ranks_E: NDArray[np.int64]
    """By ascending rank within a run."""
    run_E: NDArray[np.int64]
    counts_R: NDArray[np.int64]

    @classmethod
    def of(cls, coded: CodedRows, rank_V: NDArray[np.int32]) -> Ids:
        """Extract the ids from a shard's integers."""
        counts_R = np.concatenate([coded.always_kept.counts_N, coded.sampled.counts_N])
        ids_E = np.concatenate([coded.always_kept.ids_E, coded.sampled.ids_E]).astype(np.int64)
        run_E = np.repeat(np.arange(len(counts_R)), counts_R)
        ranks_E = rank_V[ids_E].astype(np.int64)
        return cls(
            ids_E[np.lexsort((ids_E, run_E))], ranks_E[np.lexsort((ranks_E, run_E))], run_E,
            counts_R,
        )  # fmt: skip


def tried(
    rows: list[CachedSequence], tails: list[NDArray[np.float32]], spec: CodecSpec
) -> Iterator[tuple[str, float]]:
    """Yield the name and the bytes per supervised token of each coding, of ids unless named
    otherwise."""
    heads, coded = quantised(rows, spec, tails)
    tokens = len(coded.label_N)
    order_V = order_of_classes(frequency_classes(coded, spec.vocab_size))
    rank_V = np.empty(spec.vocab_size, np.int32)
    rank_V[order_V] = np.arange(spec.vocab_size, dtype=np.int32)
    ids = Ids.of(coded, rank_V)
    sizes = column_sizes(parquet_bytes(coded_table(heads, coded, spec, {})))
    ours = sum(size for name, size in sizes.items() if "_ids_" in name or name.endswith("_bits"))
    yield "ours: gaps of ranks, class as a symbol, bits apart; zstd", ours / tokens
    symbols, bits = _ideal(ids.ranks_E, ids.run_E, ids.counts_R)
    yield "the same by entropy: symbols by stream, and their bits", (symbols + bits) / 8 / tokens
    for name, values_E in (("ids", ids.ids_E), ("ranks", ids.ranks_E)):
        packed = _written(values_E.astype(np.int32))
        yield f"{name} ascending, DELTA_BINARY_PACKED, zstd", packed / tokens
        gaps_E = _gaps(values_E, ids.run_E)
        planes = sum(_written((gaps_E >> shift & 255).astype(np.uint8)) for shift in (0, 8, 16))
        yield f"gaps of {name}, byte planes, zstd", planes / tokens
        yield f"gaps of {name}, packed at one width a run", _packed(gaps_E, ids) / tokens
        yield f"{name}, Elias-Fano a run, without its header", _elias_fano(values_E, ids) / tokens
    again, rest, share = _previous(coded, heads, rank_V)
    yield (
        f"by entropy, {100 * share:.0f} % of the entries from the {_LAGS} positions before",
        (again + rest) / 8 / tokens,
    )
    yield from _dictionary(coded, heads, order_V, spec)


def _gaps(values_E: NDArray[np.int64], run_E: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each number's gap to the one before it in its run, less 1; the first unchanged."""
    before_E = np.concatenate([[-1], values_E[:-1]])
    first_E = np.concatenate([[True], run_E[1:] != run_E[:-1]])
    return values_E - np.where(first_E, -1, before_E) - 1


def _classes(
    ranks_E: NDArray[np.int64], run_E: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each gap's class, and the stream its symbol belongs to, as in FORMAT.md 8.3."""
    gaps_E = _gaps(ranks_E, run_E)
    classes_E = np.frexp((gaps_E + 1).astype(np.float64))[1].astype(np.int64) - 1
    before_E = ranks_E - gaps_E - 1
    last_E = np.concatenate([run_E[1:] != run_E[:-1], [True]])[: len(run_E)]
    return classes_E, 2 * (before_E >= 62) + last_E


def _entropy(symbols_E: NDArray[np.int64]) -> float:
    """Return the bits of symbols at the entropy of their frequencies."""
    times = np.bincount(symbols_E)
    times = times[times > 0]
    return float(-(times * np.log2(times / times.sum())).sum()) if times.size else 0.0


def _ideal(
    ranks_E: NDArray[np.int64], run_E: NDArray[np.int64], counts_R: NDArray[np.int64]
) -> tuple[float, float]:
    """Return the bits of symbols by entropy, and the bits that follow them."""
    classes_E, stream_E = _classes(ranks_E, run_E)
    sampled_E = run_E >= len(counts_R) // 2
    context_E = stream_E + 4 * sampled_E
    symbols = sum(_entropy(classes_E[context_E == context]) for context in range(8))
    return symbols, float(classes_E.sum())


def _packed(gaps_E: NDArray[np.int64], ids: Ids) -> float:
    """Return the bytes of gaps at the width of their run's largest, and of the widths."""
    width_E = np.frexp(gaps_E.astype(np.float64))[1].astype(np.int64)
    widths_R = np.zeros(len(ids.counts_R), np.int64)
    np.maximum.at(widths_R, ids.run_E, width_E)
    return float((widths_R * ids.counts_R).sum()) / 8 + _written(widths_R.astype(np.uint8))


def _elias_fano(values_E: NDArray[np.int64], ids: Ids) -> float:
    """Return the bytes of Elias-Fano (Elias 1974; Fano 1971) for each run by itself.

    n numbers up to u take n * l bits, l = floor(log2(u / n)), and n + (u >> l) in unary.
    """
    counts_r = ids.counts_R[ids.counts_R > 0]
    last_r = values_E[np.cumsum(counts_r) - 1]
    low_r = np.floor(np.log2(np.maximum((last_r + 1) / counts_r, 1))).astype(np.int64)
    return float((counts_r * low_r + counts_r + (last_r >> low_r)).sum()) / 8


def _previous(
    coded: CodedRows, heads: Heads, rank_V: NDArray[np.int32]
) -> tuple[float, float, float]:
    """Return the bits of repeated tokens, the bits of the others, and the share of the repeated.

    A token of the earlier positions is a candidate; whether it is repeated is coded at its entropy,
    in the context of which positions hold it. Candidates are those of any kind, label tokens among
    them.
    """
    positions = len(coded.label_N)
    row_N = np.repeat(np.arange(len(coded.positions_S)), coded.positions_S)
    held = np.concatenate(
        [np.arange(positions) << 18 | heads.label_ids_N]
        + [
            np.repeat(np.arange(positions), run.counts_N) << 18 | run.ids_E
            for run in (coded.always_kept, coded.sampled)
        ]
    )
    keys, lags = [], []
    for lag in range(1, _LAGS + 1):
        place = (held >> 18) + lag
        fits = place < positions
        fits[fits] = row_N[place[fits]] == row_N[place[fits] - lag]
        keys.append(held[fits] + (lag << 18))
        lags.append(np.full(int(fits.sum()), 1 << (lag - 1)))
    candidates_C, owner = np.unique(np.concatenate(keys), return_inverse=True)
    context_C = np.zeros(len(candidates_C), np.int64)
    np.bitwise_or.at(context_C, owner, np.concatenate(lags))
    again = rest = 0.0
    found = total = 0
    for kind, run in enumerate((coded.always_kept, coded.sampled)):
        owner_E = np.repeat(np.arange(positions), run.counts_N)
        entries_E = owner_E << 18 | run.ids_E
        hit_C = np.isin(candidates_C, entries_E)
        again += sum(_entropy(hit_C[context_C == c].astype(np.int64)) for c in range(1 << _LAGS))
        new_E = ~np.isin(entries_E, candidates_C)
        ranks = rank_V[run.ids_E[new_E]].astype(np.int64)
        runs = owner_E[new_E]
        ranks = ranks[np.lexsort((ranks, runs))]
        halves = np.zeros(2 * positions, np.int64)
        symbols, bits = _ideal(ranks, runs + kind * positions, halves)
        rest += symbols + bits
        found, total = found + int((~new_E).sum()), total + len(new_E)
    return again, rest, found / total


def _dictionary(
    coded: CodedRows, heads: Heads, order_V: NDArray[np.int32], spec: CodecSpec
) -> Iterator[tuple[str, float]]:
    """Yield sizes of the second half of the rows: columns, and one cell a row.

    The cells' dictionary is trained on the first half, as on a first shard.
    """
    columns = pack(coded, order_V, spec)
    count = len(coded.positions_S)
    half = count // 2
    cells = [b"".join(_cell(columns[name], row) for name in COLUMNS) for row in range(count)]
    tokens = int(coded.positions_S[half:].sum())
    trained = zstandard.train_dictionary(_DICTIONARY, cells[:half])
    alone = zstandard.ZstdCompressor(level=_LEVEL)
    taught = zstandard.ZstdCompressor(level=_LEVEL, dict_data=trained)
    column_bytes = sum(
        _written(
            np.frombuffer(b"".join(_cell(columns[n], r) for r in range(half, count)), np.uint8)
        )
        for n in COLUMNS
    )
    yield "whole target, second half of the rows: a column a stream", column_bytes / tokens
    sizes = [(len(alone.compress(cell)), len(taught.compress(cell))) for cell in cells[half:]]
    yield "  one cell a row, zstd", sum(size for size, _ in sizes) / tokens
    yield "  one cell a row, zstd with a trained dictionary", sum(s for _, s in sizes) / tokens
    joined = len(alone.compress(b"".join(cells[half:])))
    yield "  all cells in one frame", joined / tokens


def _cell(blobs: Blobs, row: int) -> bytes:
    return blobs.data[blobs.starts[row] : blobs.starts[row + 1]].tobytes()


def _written(values: NDArray[Any]) -> int:
    """Return the bytes of a Parquet column, zstd on top: packed deltas of integers, plain bytes."""
    whole = values.dtype != np.uint8
    column = pa.array(values) if whole else pa.array([values.tobytes()], pa.binary())
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"v": column}), sink, compression="zstd", compression_level=1,
        use_dictionary=False, column_encoding={"v": "DELTA_BINARY_PACKED" if whole else "PLAIN"},
    )  # fmt: skip
    return sum(column_sizes(sink.getvalue().to_pybytes()).values())
