"""Many rows decoded at once are the rows decoded one by one, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.cache.codec.gaps import CodecSpec, decode_entries, decode_rows, encode_entries
from pipeline.cache.codec.targets import SparseTargets
from pipeline.errors import CacheError


def blob_of(
    rng: np.random.Generator, counts: list[int], vocab: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], CodecSpec]:
    # The highest ids too, where a sum of gaps would overflow first.
    low = max(0, vocab - 100_000)
    ids = [np.sort(rng.choice(min(vocab, 100_000), k, replace=False)) + low for k in counts]
    entries = sum(counts)
    spec = CodecSpec(vocab)
    none = np.zeros(0, np.float32)
    targets = SparseTargets(
        counts_N=np.array(counts, np.int32),
        token_ids_E=np.concatenate([np.zeros(0, np.int64), *ids]).astype(np.int32),
        # Whole numbers: many equal values, of which one is the largest entry.
        logprobs_E=-rng.integers(0, 24, entries).astype(np.float32),
        inclusion_E=None,
        temperatures=(1.0,),
        log_z_NG=none,
        entropy_NG=none,
        gold_logprob_N=none,
    )
    blob = np.frombuffer(encode_entries(targets, spec), np.uint8)
    return blob, rng.uniform(0, 0.5, len(counts)).astype(np.float32), spec


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    width=st.integers(0, 40),
    ragged=st.booleans(),
    vocab=st.sampled_from([64, 65_536, 65_537, 1 << 24]),
    seed=st.integers(0, 1 << 30),
)
def test_the_same_bits(shape: list[int], width: int, ragged: bool, vocab: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = []
    for positions in shape:
        counts = rng.integers(0, width + 1, positions) if ragged else np.full(positions, width)
        made.append(blob_of(rng, counts.tolist(), vocab))
    blobs, tails, specs = zip(*made, strict=True)
    rows = decode_rows(blobs, shape, specs[0], tails=tails)
    assert len(rows) == len(shape)
    for row, blob, positions, tail_N in zip(rows, blobs, shape, tails, strict=True):
        alone = decode_entries(blob, positions, specs[0], tail_N=tail_N)
        for ours, theirs in zip(row, alone, strict=True):
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)


def test_damage_is_found_in_a_rectangle_too() -> None:
    rng = np.random.default_rng(0)
    blob, tail_N, spec = blob_of(rng, [8, 8, 8], 64)
    for damaged, says in (
        (blob[:-1], "does not hold the 24 entries"),
        (blob[:5], "is cut short"),
        (np.append(blob, np.uint8(0)), "does not hold the 24 entries"),
    ):
        with pytest.raises(CacheError, match=says):
            decode_rows([blob, damaged], [3, 3], spec, tails=[tail_N, tail_N])
    beyond = blob.copy()
    beyond[6:30] = 200
    with pytest.raises(CacheError, match="outside the vocabulary of 64"):
        decode_rows([beyond, blob], [3, 3], spec, tails=[tail_N, tail_N])
