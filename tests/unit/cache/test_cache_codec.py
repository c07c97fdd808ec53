"""The entries blob: what goes in comes out, what cannot go in is refused, damage is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.cache.codec.gaps import CodecSpec, decode_entries, encode_entries
from pipeline.cache.codec.targets import SparseTargets
from pipeline.errors import CacheError

STEP = 1 / 12


def _targets(counts: list[int], ids: list[int], logprobs: list[float]) -> SparseTargets:
    number = len(counts)
    return SparseTargets(
        counts_N=np.array(counts, np.int32),
        token_ids_E=np.array(ids, np.int32),
        logprobs_E=np.array(logprobs, np.float32),
        inclusion_E=None,
        temperatures=(1.0,),
        log_z_NG=np.zeros((number, 1), np.float32),
        entropy_NG=np.zeros((number, 1), np.float32),
        gold_logprob_N=np.zeros(number, np.float32),
    )


@st.composite
def _sequences(draw: st.DrawFn) -> tuple[CodecSpec, SparseTargets]:
    vocab = draw(st.sampled_from([1, 2, 300, 1 << 16, (1 << 16) + 1, 1 << 18, 1 << 24]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    counts = draw(st.lists(st.integers(0, min(vocab, 40)), max_size=6))
    dense = draw(st.booleans())  # neighbours at the end of the vocabulary, or ids far apart
    ids: list[int] = []
    for count in counts:
        near = range(vocab - count, vocab)
        ids += near if dense or vocab < 99 else sorted({*rng.integers(0, vocab, 99)})[:count]
    counts = [min(c, len(ids)) for c in counts] if sum(counts) == len(ids) else []
    ids = ids if counts else []
    low = draw(st.sampled_from([0.5, 8.0, 30.0]))
    values = -rng.uniform(0, low, len(ids))
    step = draw(st.sampled_from([STEP, 1.0, 0.01]))
    return CodecSpec(vocab_size=vocab, step_nats=step), _targets(counts, ids, values.tolist())


@given(_sequences())
@example((CodecSpec(vocab_size=1 << 18), _targets([], [], [])))
@example((CodecSpec(vocab_size=1 << 18), _targets([0, 0], [], [])))
@example((CodecSpec(vocab_size=1 << 18), _targets([0, 1, 0, 1], [(1 << 18) - 1, 0], [0, -9.0])))
@settings(max_examples=300, deadline=None)
def test_round_trip_on_the_grid(case: tuple[CodecSpec, SparseTargets]) -> None:
    spec, targets = case
    blob = encode_entries(targets, spec)
    planes = 2 if spec.vocab_size <= 65536 else 3
    assert len(blob) == 2 * targets.num_positions + (planes + 1) * targets.token_ids_E.size
    counts, ids, logprobs = decode_entries(blob, targets.num_positions, spec, tail_N=None)
    assert counts.tolist() == targets.counts_N.tolist()
    assert ids.tolist() == targets.token_ids_E.tolist()
    assert (ids.dtype, logprobs.dtype) == (np.int32, np.float32)
    wanted = np.maximum(targets.logprobs_E, -255 * spec.step_nats)
    assert np.abs(logprobs - wanted).max(initial=0) <= spec.step_nats / 2 + 1e-5


@given(
    seed=st.integers(0, 2**32),
    counts=st.lists(st.integers(0, 64), min_size=1, max_size=8),
    sharpness=st.sampled_from([0.0, 1.0, 4.0, 12.0]),
)
@example(seed=0, counts=[1], sharpness=12.0)
@example(seed=0, counts=[1, 0, 1], sharpness=0.0)
@settings(max_examples=200, deadline=None)
def test_largest_entry_is_what_the_others_leave(
    seed: int, counts: list[int], sharpness: float
) -> None:
    vocab = 1 << 18
    rng = np.random.default_rng(seed)
    ids, true, tails = [], [], []
    for count in counts:
        z = rng.normal(0, max(sharpness, 1e-9), 256)
        p = np.sort(np.exp(z) / np.exp(z).sum())[::-1][:count]
        ids += sorted(rng.choice(vocab, count, replace=False).tolist())
        true.append(rng.permutation(p))
        tails.append(1 - p.sum())
    spec = CodecSpec(vocab_size=vocab)
    targets = _targets(counts, ids, np.log(np.concatenate([*true, [1.0]]))[:-1].tolist())
    tail_N = np.array(tails, np.float32)
    blob = encode_entries(targets, spec)
    _, same_ids, logprobs = decode_entries(blob, len(counts), spec, tail_N=tail_N)
    _, _, on_grid = decode_entries(blob, len(counts), spec, tail_N=None)
    assert same_ids.tolist() == ids
    start = 0
    for count, tail in zip(counts, tail_N.astype(np.float64), strict=True):
        got = logprobs[start : start + count].astype(np.float64)
        grid = on_grid[start : start + count].astype(np.float64)
        start += count
        if not count:
            continue
        changed = np.flatnonzero(got != grid)
        assert changed.tolist() in ([], [int(np.argmax(grid))])
        assert np.abs(got - grid).max() <= STEP + 1e-6
        before, after = (abs(np.exp(x).sum() - (1 - tail)) for x in (grid, got))
        assert after <= before + 1e-6
        moved = abs(got[np.argmax(grid)] - grid[np.argmax(grid)])
        if moved < STEP - 1e-5 and got[np.argmax(grid)] < 0:
            assert after < 1e-6  # the sum is restored exactly wherever the bounds leave room


def test_confident_teacher_is_exact_where_the_grid_is_not() -> None:
    spec = CodecSpec(vocab_size=1000)
    p = np.array([0.01, 0.96, 0.02])
    blob = encode_entries(_targets([3], [3, 500, 999], np.log(p).tolist()), spec)
    tail = np.array([0.01], np.float16).astype(np.float32)
    _, _, on_grid = decode_entries(blob, 1, spec, tail_N=None)
    _, _, restored = decode_entries(blob, 1, spec, tail_N=tail)
    assert abs(np.exp(on_grid[1]) - 0.96) > 0.03
    assert abs(np.exp(restored[1]) - 0.96) < 0.002


def test_of_equal_grid_values_the_lowest_id_is_restored() -> None:
    spec = CodecSpec(vocab_size=1000)
    blob = encode_entries(_targets([3], [3, 500, 999], np.log([0.33, 0.33, 0.33]).tolist()), spec)
    _, _, logprobs = decode_entries(blob, 1, spec, tail_N=np.array([0.01], np.float32))
    assert logprobs[1] == logprobs[2] != logprobs[0]


@pytest.mark.parametrize(
    ("counts", "ids", "logprobs", "says"),
    [
        ([2], [5, 5], [-1, -1], "not ascending"),
        ([2], [6, 5], [-1, -1], "not ascending"),
        ([1], [300], [-1], "outside the vocabulary of 300"),
        ([1], [-1], [-1], "outside the vocabulary"),
        ([1], [5], [float("nan")], "not finite"),
        ([1], [5], [float("-inf")], "not finite"),
        ([2], [5], [-1], "differ in length"),
        ([1], [5], [-1, -2], "differ in length"),
        ([-1, 2], [5], [-1], "65,535"),
        ([65536], list(range(65536)), [-1] * 65536, "65,535"),
    ],
)
def test_what_cannot_be_encoded_is_refused(
    counts: list[int], ids: list[int], logprobs: list[float], says: str
) -> None:
    vocab = 300 if len(ids) < 1000 else 1 << 18
    with pytest.raises(CacheError, match=says):
        encode_entries(_targets(counts, ids, logprobs), CodecSpec(vocab_size=vocab))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "bits"}, "newer"), ({"name": None}, "gaps-u8"), ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": (1 << 24) + 1}, "vocab_size"), ({"vocab_size": 3.0}, "vocab_size"),
        ({"step_nats": 0}, "step_nats"), ({"step_nats": 1.5}, "step_nats"),
        ({"step_nats": "x"}, "step_nats"),
    ],
)  # fmt: skip
def test_codec_of_another_kind_is_refused(change: dict[str, Any], says: str) -> None:
    good = CodecSpec(vocab_size=300).to_json()
    assert CodecSpec.from_json(good) == CodecSpec(vocab_size=300)
    with pytest.raises(CacheError, match=says):
        CodecSpec.from_json({**good, **change})


def _survives(blob: bytes, positions: int, spec: CodecSpec, tail: np.ndarray) -> None:
    try:
        counts, ids, logprobs = decode_entries(blob, positions, spec, tail_N=tail)
    except CacheError:
        return
    assert counts.size == positions
    assert counts.sum() == ids.size == logprobs.size
    assert ((ids >= 0) & (ids < spec.vocab_size)).all()
    assert np.isfinite(logprobs).all()
    assert (logprobs <= 0).all()


@given(
    blob=st.binary(max_size=80),
    positions=st.integers(0, 12),
    vocab=st.sampled_from([1, 300, 1 << 16, 1 << 18]),
    step=st.sampled_from([STEP, 1.0]),
    tail=st.floats(0, 1, width=16),
)
@settings(max_examples=500, deadline=None)
def test_random_bytes_never_pass_for_something_impossible(
    blob: bytes, positions: int, vocab: int, step: float, tail: float
) -> None:
    spec = CodecSpec(vocab_size=vocab, step_nats=step)
    _survives(blob, positions, spec, np.full(positions, tail, np.float32))


@given(
    case=_sequences(),
    at=st.integers(0, 10_000),
    bit=st.integers(0, 7),
    kind=st.sampled_from(["flip", "cut", "longer", "positions"]),
    extra=st.binary(min_size=1, max_size=9),
)
@settings(max_examples=600, deadline=None)
def test_damage_raises_cache_error_or_stays_within_bounds(
    case: tuple[CodecSpec, SparseTargets], at: int, bit: int, kind: str, extra: bytes
) -> None:
    spec, targets = case
    blob = bytearray(encode_entries(targets, spec))
    positions = targets.num_positions
    if kind == "flip" and blob:
        blob[at % len(blob)] ^= 1 << bit
    elif kind == "cut" and blob:
        del blob[at % len(blob) :]
    elif kind == "longer":
        blob += extra
    else:
        positions += 1
    _survives(bytes(blob), positions, spec, np.full(positions, 0.25, np.float32))
    if kind == "longer" or (kind == "cut" and len(blob) >= 2 * positions):
        with pytest.raises(CacheError, match="does not hold"):
            decode_entries(bytes(blob), positions, spec, tail_N=None)
