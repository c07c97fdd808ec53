"""Sparse targets to compact bytes and back, one blob per sequence (codec "gaps-u8", numpy only).

Legend: N counted positions, E entries, G temperatures. FORMAT.md is normative.

Ids are ascending within a position, so gaps are small and their high byte plane is nearly empty;
values are -log p on a linear grid. With certain entries the largest one is not read from its grid
value but as what the others and the stored tail leave of 1: for a confident teacher (p = 0.97) the
grid alone would be off by 0.04 in probability, the rest is off by less than 0.001.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.targets import SparseTargets
from pipeline.errors import CacheError

__all__ = [
    "MAX_VOCAB_SIZE", "CodecSpec", "decode_entries", "decode_rows", "encode_entries",
    "restore_largest",
]  # fmt: skip

MAX_VOCAB_SIZE = 1 << 24
_LEVELS = 255


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """Everything a reader needs to decode a blob; stored in every shard and in the manifest."""

    vocab_size: int
    """Rows of the teacher's head; ids are below."""
    step_nats: float = 1 / 12
    """Grid of -log p. 1/12 spans 21.25 nats in a byte; its error (RMS 0.024 nats) is below the
    0.064 nats by which bfloat16 moves the teacher's own values."""
    name: str = "gaps-u8"

    @property
    def id_planes(self) -> int:
        """Byte planes of an id gap: 2 up to a vocabulary of 65,536, else 3."""
        return 2 if self.vocab_size <= 1 << 16 else 3

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"name": self.name, "vocab_size": self.vocab_size, "step_nats": self.step_nats}

    @classmethod
    def from_json(cls, data: dict[str, object]) -> CodecSpec:
        """Read the JSON form.

        Raises:
            CacheError: a codec this version does not know, or values it cannot have.
        """
        name, vocab, step = data.get("name"), data.get("vocab_size"), data.get("step_nats")
        if name != "gaps-u8":
            raise CacheError(
                f"the cache's codec is {name!r}",
                expected="gaps-u8",
                do="read it with the version of this project that wrote it, or a newer one",
            )
        if not isinstance(vocab, int) or not 1 <= vocab <= MAX_VOCAB_SIZE:
            raise CacheError(f"the codec's vocab_size is {vocab!r}", expected="1 to 2^24")
        if not isinstance(step, int | float) or not 0 < step <= 1:
            raise CacheError(f"the codec's step_nats is {step!r}", expected="above 0, at most 1")
        return cls(vocab_size=vocab, step_nats=float(step))


def encode_entries(targets: SparseTargets, spec: CodecSpec) -> bytes:
    """Encode ids and log-probs of one sequence.

    Layout: N counts as uint16 little-endian; then the byte planes of the E gaps, low plane first;
    then E grid values as uint8.

    Raises:
        CacheError: counts above 65,535, ids not ascending or out of range, log p not finite.
    """
    counts_N = targets.counts_N
    ids_E = targets.token_ids_E.astype(np.int64)
    if counts_N.size and (counts_N.min() < 0 or counts_N.max() > 0xFFFF):
        raise CacheError("a position has more than 65,535 entries")
    if int(counts_N.sum()) != ids_E.size or ids_E.size != targets.logprobs_E.size:
        raise CacheError("counts, ids and log-probs of a sequence differ in length")
    if ids_E.size and (ids_E.min() < 0 or ids_E.max() >= spec.vocab_size):
        raise CacheError(f"a token id is outside the vocabulary of {spec.vocab_size}")
    if not np.isfinite(targets.logprobs_E).all():
        raise CacheError("a log-probability is not finite")
    gaps_E = _gaps(ids_E, counts_N)
    if gaps_E.size and gaps_E.min() < 0:
        raise CacheError("the ids of a position are not ascending")
    grid_E = np.rint(-targets.logprobs_E / spec.step_nats)
    parts = [counts_N.astype("<u2").tobytes()]
    parts += [
        ((gaps_E >> (8 * plane)) & 0xFF).astype(np.uint8).tobytes()
        for plane in range(spec.id_planes)
    ]
    parts.append(np.clip(grid_E, 0, _LEVELS).astype(np.uint8).tobytes())
    return b"".join(parts)


def decode_entries(
    blob: bytes | memoryview | NDArray[np.uint8],
    num_positions: int,
    spec: CodecSpec,
    *,
    tail_N: NDArray[np.float32] | None,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """Decode one sequence's blob.

    Args:
        blob: as `encode_entries` wrote it.
        num_positions: N, from the row.
        spec: the shard's codec.
        tail_N: mass outside the entries at temperature 1, for certain entries (top-k); None
            leaves every value on its grid.

    Returns:
        counts_N int32, token_ids_E int32, logprobs_E float32.

    Raises:
        CacheError: the blob's length or content cannot have been written by the encoder.
    """
    data = np.frombuffer(blob, np.uint8)
    head = 2 * num_positions
    if data.size < head:
        raise CacheError(f"a blob of {data.size} bytes for {num_positions} positions is cut short")
    counts_N = data[:head].view("<u2").astype(np.int32)
    entries = int(counts_N.sum())
    planes = spec.id_planes
    if data.size != head + entries * (planes + 1):
        raise CacheError(
            f"a blob of {data.size} bytes does not hold the {entries} entries it announces"
        )
    gaps_E = np.zeros(entries, np.int64)
    for plane in range(planes):
        start = head + plane * entries
        gaps_E += data[start : start + entries].astype(np.int64) << (8 * plane)
    ids_E = _cumulate(gaps_E, counts_N)
    if entries:
        _check_ids(int(ids_E.max()), spec)
    grid_E = data[head + planes * entries :]
    logprobs_E = grid_E.astype(np.float32) * np.float32(-spec.step_nats)
    if tail_N is not None and entries:
        restore_largest(logprobs_E, counts_N, tail_N, spec.step_nats)
    return counts_N, ids_E.astype(np.int32), logprobs_E


def decode_rows(
    blobs: Sequence[NDArray[np.uint8]],
    positions: Sequence[int],
    spec: CodecSpec,
    *,
    tails: Sequence[NDArray[np.float32]],
) -> list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]]:
    """Decode several sequences; the same bits as `decode_entries` of each, in a third of the time.

    Where all positions of all sequences have as many entries, as in a top-k cache, these are one
    rectangle, without an index for each entry and without a call for each sequence.

    Args:
        blobs: of each sequence.
        positions: N of each sequence.
        spec: the shard's codec.
        tails: of each sequence, as in `decode_entries`.

    Raises:
        CacheError: as `decode_entries`.
    """
    parts = list(zip(blobs, positions, strict=True))
    counts = [blob[: 2 * number].view("<u2") for blob, number in parts if blob.size >= 2 * number]
    counts_N = np.concatenate([np.zeros(0, np.uint16), *counts])
    width, planes = int(counts_N.max(initial=0)), spec.id_planes + 1
    regular = len(counts_N) * width > 0 and all(
        blob.size == number * (2 + planes * width) for blob, number in parts
    )
    if not regular or counts_N.min() < width:
        return [
            decode_entries(blob, number, spec, tail_N=tail_N)
            for (blob, number), tail_N in zip(parts, tails, strict=True)
        ]
    planes_PNK = np.concatenate(
        [blob[2 * number :].reshape(planes, number, width) for blob, number in parts], axis=1
    )
    ids_NK, logprobs_NK = _decode_rectangle(planes_PNK, spec, np.concatenate(tails))
    bounds = np.cumsum([0, *positions]).tolist()
    wide_N = counts_N.astype(np.int32)
    return [
        (wide_N[a:b], ids_NK[a:b].reshape(-1), logprobs_NK[a:b].reshape(-1))
        for a, b in pairwise(bounds)
    ]


def _decode_rectangle(
    planes_PNK: NDArray[np.uint8], spec: CodecSpec, tail_N: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Decode K entries of each of N positions."""
    *id_planes, grid_NK = planes_PNK
    width = grid_NK.shape[1]
    gaps_NK = id_planes[0].astype(np.int32)
    for number, plane_NK in enumerate(id_planes[1:], start=1):
        gaps_NK += plane_NK.astype(np.int32) << (8 * number)
    fits = (int(gaps_NK.max()) + 1) * width < 1 << 31
    ids_NK: NDArray[Any] = np.cumsum(gaps_NK, axis=1, dtype=np.int32 if fits else np.int64)
    ids_NK += np.arange(width, dtype=ids_NK.dtype)
    _check_ids(int(ids_NK[:, -1].max()), spec)
    logprobs_NK = grid_NK * np.float32(-spec.step_nats)
    # A value is one of 256: looked up, an exponential costs a fifth.
    values = np.arange(_LEVELS + 1).astype(np.float32) * np.float32(-spec.step_nats)
    probs_NK = np.exp(values.astype(np.float64)).take(grid_NK)
    starts_N = np.arange(0, grid_NK.size, width)
    sums_N = np.add.reduceat(probs_NK.reshape(-1), starts_N)
    # Of equal grid values the lowest id is taken, which is the first.
    at_N = grid_NK.argmin(1) + starts_N
    own_N = probs_NK.reshape(-1)[at_N]
    logprobs_NK.reshape(-1)[at_N] = _largest(own_N, sums_N, tail_N, spec.step_nats)
    return ids_NK.astype(np.int32, copy=False), logprobs_NK


def _check_ids(largest: int, spec: CodecSpec) -> None:
    if largest >= spec.vocab_size:
        raise CacheError(f"a decoded token id is outside the vocabulary of {spec.vocab_size}")


def _starts(counts_N: NDArray[np.int32]) -> NDArray[np.int64]:
    starts_N = np.zeros(counts_N.size, np.int64)
    np.cumsum(counts_N[:-1], out=starts_N[1:])
    return starts_N


def _gaps(ids_E: NDArray[np.int64], counts_N: NDArray[np.int32]) -> NDArray[np.int64]:
    """First id of a position as it is, then differences minus one."""
    if not ids_E.size:
        return ids_E
    gaps_E = np.empty_like(ids_E)
    gaps_E[0] = ids_E[0]
    gaps_E[1:] = np.diff(ids_E) - 1
    first = _starts(counts_N)[counts_N > 0]
    gaps_E[first] = ids_E[first]
    return gaps_E


def _cumulate(gaps_E: NDArray[np.int64], counts_N: NDArray[np.int32]) -> NDArray[np.int64]:
    if not gaps_E.size:
        return gaps_E
    steps_E = gaps_E + 1
    total_E = np.cumsum(steps_E)
    first = _starts(counts_N)[counts_N > 0]
    before = total_E[first] - steps_E[first]
    ids_E: NDArray[np.int64] = total_E - np.repeat(before, counts_N[counts_N > 0]) - 1
    return ids_E


def restore_largest(
    logprobs_E: NDArray[np.float32],
    counts_N: NDArray[np.int32],
    tail_N: NDArray[np.float32],
    step: float,
) -> None:
    """Set each position's largest entry to 1 - tail - others, within one grid step of its own."""
    filled = counts_N > 0
    first = _starts(counts_N)[filled]
    counts = counts_N[filled]
    probs_E = np.exp(logprobs_E.astype(np.float64))
    sums = np.add.reduceat(probs_E, first)
    largest = np.maximum.reduceat(logprobs_E, first)
    is_largest_E = logprobs_E == np.repeat(largest, counts)
    # Of equal grid values the lowest id is taken; any choice is as good, but it must be one.
    candidates = np.flatnonzero(is_largest_E)
    owner = np.repeat(np.arange(counts.size), counts)[candidates]
    at = candidates[np.unique(owner, return_index=True)[1]]
    own = probs_E[at]
    logprobs_E[at] = _largest(own, sums, tail_N[filled], step)


def _largest(
    own_N: NDArray[np.float64],
    sums_N: NDArray[np.float64],
    tail_N: NDArray[np.float32],
    step: float,
) -> NDArray[np.float32]:
    """Return log p of each position's largest entry: what tail and others leave of 1."""
    rest_N = 1.0 - tail_N.astype(np.float64) - (sums_N - own_N)
    low_N, high_N = own_N * np.exp(-step), np.minimum(own_N * np.exp(step), 1.0)
    # Only damaged values are all so small that their exponentials are 0.
    least = np.finfo(np.float64).tiny
    logs_N: NDArray[np.float64] = np.log(np.maximum(np.clip(rest_N, low_N, high_N), least))
    return logs_N.astype(np.float32)
