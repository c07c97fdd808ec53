"""The teacher's likeliest token comes back, whatever quantisation makes of its neighbours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.cache.codec.kernels_targets import MOST_SUMMED, values_of_top_k
from pipeline.cache.codec.largest import (
    Candidates,
    _by_numpy,
    packed_places,
    top_k_logprobs,
    unpacked_places,
)
from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.codec.subsample import EntryLimit
from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.writer import encode_shard
from pipeline.cache.layout.schema import table_to_rows
from pipeline.errors import CacheError
from pipeline.sampling.inclusion import InclusionRule
from tests.unit.cache.sample_cache import sample_rows
from tests.unit.cache.sampled_cache import GRID, RULES, VOCAB, sampled_rows

Rows = tuple[list[CachedSequence], list[NDArray[np.float32]]]


def _largest(row: CachedSequence) -> NDArray[np.int32]:
    """Return the id of the largest always-kept entry of each position; -1 where there is none."""
    targets, found = row.targets, []
    starts = np.cumsum(targets.counts_N) - targets.counts_N
    for start, count in zip(starts.tolist(), targets.counts_N.tolist(), strict=True):
        values = targets.logprobs_E[start : start + count].copy()
        if targets.inclusion_E is not None:
            values[targets.inclusion_E[start : start + count] < 1] = -np.inf
        found.append(int(targets.token_ids_E[start + values.argmax()]) if count else -1)
    return np.array(found, np.int32)


def _rows(number: int, seed: int, rule: InclusionRule | None, **shape: float) -> Rows:
    """Return rows that know their likeliest tokens."""
    rows, tails = (
        sample_rows(number, seed) if rule is None else sampled_rows(number, seed, rule, **shape)
    )
    return [
        replace(row, targets=replace(row.targets, largest_N=_largest(row))) for row in rows
    ], tails


def _table(
    rows: list[CachedSequence], tails: list[NDArray[np.float32]], spec: CodecSpec
) -> pa.Table:
    _, data = encode_shard(
        rows, spec, split="train", index=0, temperatures=GRID, identity_digest="0" * 64,
        tails=tails,
    )  # fmt: skip
    return pq.read_table(pa.BufferReader(data))


def _same(before: list[CachedSequence], after: list[CachedSequence]) -> None:
    for one, other in zip(before, after, strict=True):
        assert one.targets.largest_N is not None
        assert other.targets.largest_N is not None
        assert one.targets.largest_N.tolist() == other.targets.largest_N.tolist()


@given(
    seed=st.integers(0, 2**32),
    rule=st.sampled_from([None, *RULES]),
    spread=st.sampled_from([0.02, 0.3, 3.0]),
)
@settings(max_examples=40, deadline=None)
def test_the_likeliest_token_comes_back(
    seed: int, rule: InclusionRule | None, spread: float
) -> None:
    """Also where all log-probs are nearly equal, and of fewer entries."""
    rows, tails = _rows(4, seed, rule, exact=5, spread=spread)
    spec = CodecSpec(VOCAB, rule, largest_known=True)
    table = _table(rows, tails, spec)
    _same(rows, table_to_rows(table, spec, GRID))
    limit = EntryLimit(top_k=1) if rule is None else EntryLimit(tau_factor=3.0)
    fewer = table_to_rows(table, spec, GRID, limit)
    _same(rows, fewer)
    for row in fewer:
        targets = row.targets
        assert targets.largest_N is not None
        owner_E = np.repeat(np.arange(targets.num_positions), targets.counts_N)
        is_it_E = targets.token_ids_E == targets.largest_N[owner_E]
        assert (np.bincount(owner_E[is_it_E], minlength=targets.num_positions) == 1)[
            targets.counts_N > 0
        ].all()
        if targets.inclusion_E is not None:
            assert (targets.inclusion_E[is_it_E] == 1).all()


def test_a_byte_only_where_codes_are_equal() -> None:
    rows, tails = _rows(30, 3, None)
    spec = CodecSpec(VOCAB, largest_known=True)
    table = _table(rows, tails, spec)
    spent = sum(len(value.as_py()) for value in table.column("largest"))
    tied = positions = 0
    for row in rows:
        targets = row.targets
        codes_E = spec.quantisation.always_kept_code(targets.logprobs_E)
        for part in np.split(codes_E, np.cumsum(targets.counts_N)[:-1]):
            tied += len(part) > 0 and int((part == part.min()).sum()) > 1
            positions += 1
    assert spent == tied > 0
    assert spent < 0.15 * positions


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_places_of_any_size_come_back(data: st.DataObject) -> None:
    shared = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 128, 129, 40_000]), max_size=12))
    place_N = np.array([data.draw(st.integers(0, max(n - 1, 0))) for n in shared], np.int64)
    shared_N = np.array(shared, np.int64)
    cut = data.draw(st.integers(0, len(shared)))
    positions_S = np.array([cut, 0, len(shared) - cut], np.int64)
    packed, lengths_S = packed_places(place_N, shared_N, positions_S)
    assert lengths_S.sum() == len(packed)
    again = unpacked_places(packed, lengths_S, shared_N, positions_S)
    assert again.tolist() == place_N.tolist()


@pytest.mark.parametrize(
    ("raw", "lengths"),
    [
        (b"", [0, 0]),  # nothing there
        (b"\x01\x00", [1, 1]),  # more than there is a choice of
        (b"\x00", [1, 0]),  # of another row
        (b"\x02", [0, 1]),  # of two entries the third
        (b"\x81", [0, 1]),  # goes on after the end
        (b"\x80\x80\x80\x00", [0, 4]),  # too long
    ],
)
def test_damaged_places_are_refused(raw: bytes, lengths: list[int]) -> None:
    with pytest.raises(CacheError, match="the column largest"):
        unpacked_places(
            np.frombuffer(raw, np.uint8), np.array(lengths), np.array([1, 2]), np.array([1, 1])
        )


def test_a_likeliest_token_that_is_none_is_refused() -> None:
    candidates = Candidates(
        np.array([2]), np.array([4, 7], np.int32), np.array([3, 3], np.uint8),
        np.array([5], np.uint8),
    )  # fmt: skip
    assert candidates.places(np.array([7], np.int32)).tolist() == [1]
    assert candidates.at(np.array([1])).tolist() == [7]
    for wrong in (-1, 5):
        with pytest.raises(CacheError, match="is not its largest always-kept entry"):
            candidates.places(np.array([wrong], np.int32))
    rows, tails = _rows(2, 0, None)
    unknown = [replace(row, targets=replace(row.targets, largest_N=None)) for row in rows]
    with pytest.raises(CacheError, match="without its likeliest tokens"):
        _table(unknown, tails, CodecSpec(VOCAB, largest_known=True))


@pytest.mark.parametrize("most", [1, 8, 9, 17, 64, MOST_SUMMED])
def test_the_sum_of_a_top_k_is_numpys_to_the_last_bit(most: int) -> None:
    rng = np.random.default_rng(most)
    counts_N = rng.integers(1, most + 1, 300).astype(np.int32)
    codes_E = rng.integers(0, 256, counts_N.sum()).astype(np.uint8)
    codes_E[rng.random(len(codes_E)) < 0.3] = 40  # several of the lowest code
    values_K = CodecSpec(512).quantisation.always_kept_values()
    probs_K = np.exp(values_K.astype(np.float64))
    logprobs_E = np.empty(len(codes_E), np.float32)
    at_N, sums_N = np.empty(300, np.int64), np.empty(300, np.float64)
    values_of_top_k(counts_N, codes_E, values_K, probs_K, logprobs_E, at_N, sums_N)
    wanted_E, wanted_at_N, wanted_sums_N = _by_numpy(codes_E, counts_N, values_K, probs_K)
    assert np.array_equal(logprobs_E, wanted_E)
    assert np.array_equal(at_N, wanted_at_N)
    assert sums_N.tobytes() == wanted_sums_N.tobytes()


@pytest.mark.parametrize("longest", [3, MOST_SUMMED + 40])
def test_positions_without_entries_and_long_ones_have_their_values(longest: int) -> None:
    values_K = CodecSpec(512).quantisation.always_kept_values()
    counts_N = np.array([2, 0, longest, 0], np.int32)
    codes_E = (np.arange(counts_N.sum()) % 200 + 20).astype(np.uint8)
    tail_N = np.full(4, 0.25, np.float32)
    found_E = top_k_logprobs(codes_E, counts_N, tail_N, values_K, step=1 / 8)
    starts = np.cumsum(counts_N) - counts_N
    for start, count in zip(starts, counts_N, strict=True):
        if not count:
            continue
        own = values_K[codes_E[start : start + count]].astype(np.float64)
        largest = int(own.argmax())
        rest = 1 - 0.25 - (np.exp(own).sum() - np.exp(own[largest]))
        low, high = np.exp(own[largest] - 1 / 8), min(np.exp(own[largest] + 1 / 8), 1)
        own[largest] = np.log(np.clip(rest, low, high))
        np.testing.assert_allclose(found_E[start : start + count], own, rtol=1e-6)
