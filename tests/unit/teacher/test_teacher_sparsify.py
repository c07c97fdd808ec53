"""Logits to sparse columns, against the definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.codec.targets import SparseTargets
from pipeline.errors import ModelError
from pipeline.teacher.sparsify.columns import to_targets
from pipeline.teacher.sparsify.device import SparseScheme, sparsify

GRID = (1.0, 2.0, 0.5, 10.0)


def _case(
    rows: int, vocab: int, sharpness: float, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * sharpness
    label = torch.randint(vocab, (rows,), generator=generator)
    return logits.to(dtype), label


def _run(
    logits: torch.Tensor, label: torch.Tensor, scheme: SparseScheme
) -> tuple[SparseTargets, np.ndarray]:
    columns = sparsify(logits, label, scheme)
    assert columns.shape == (len(logits), scheme.num_columns)
    assert columns.dtype == torch.float32
    return to_targets(columns.numpy(), scheme, sample_id="s", label_N=label.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharpness", [0.1, 3.0, 20.0])
@pytest.mark.parametrize("top_k", [1, 5, 999])
def test_against_float64(dtype: torch.dtype, sharpness: float, top_k: int) -> None:
    logits, label = _case(7, 1000, sharpness, dtype, seed=top_k)
    scheme = SparseScheme(top_k=top_k, temperatures=GRID)
    targets, tail = _run(logits, label, scheme)
    z = logits.double().numpy()
    log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    ids = targets.token_ids_E.reshape(7, top_k)
    values = targets.logprobs_E.reshape(7, top_k)
    assert targets.counts_N.tolist() == [top_k] * 7
    assert (np.diff(ids, axis=1) > 0).all()
    assert ids.dtype == np.int32
    np.testing.assert_allclose(values, np.take_along_axis(log_p, ids, 1), atol=2e-5)
    # Of equal logits, frequent in bfloat16, any may be kept; their values are what must be top.
    np.testing.assert_allclose(np.sort(values), np.sort(log_p)[:, -top_k:], atol=2e-5)
    if dtype == torch.float32:
        assert (ids == np.sort(np.argsort(-log_p)[:, :top_k])).all()
    kept = np.take_along_axis(np.exp(log_p), ids, 1).sum(1)
    np.testing.assert_allclose(tail, 1 - kept, atol=2e-6)
    np.testing.assert_allclose(targets.label_logprob_N, log_p[range(7), label.numpy()], atol=2e-5)
    assert targets.temperatures == GRID
    for g, temperature in enumerate(GRID):
        log_z = np.logaddexp.reduce(log_p / temperature, axis=1)
        log_p_t = log_p / temperature - log_z[:, None]
        entropy = -(np.exp(log_p_t) * log_p_t).sum(1)
        np.testing.assert_allclose(targets.log_z_NG[:, g], log_z, rtol=1e-5, atol=3e-6)
        np.testing.assert_allclose(targets.entropy_NG[:, g], entropy, rtol=1e-5, atol=3e-6)
    assert (targets.log_z_NG[:, 0] == 0).all()
    assert (targets.entropy_NG >= 0).all()


@given(
    rows=st.integers(1, 40),
    vocab=st.integers(2, 300),
    seed=st.integers(0, 2**31),
    chunk=st.integers(1, 8),
    bf16=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_chunks_of_any_size_give_the_same_bits(
    rows: int, vocab: int, seed: int, chunk: int, bf16: bool
) -> None:
    logits, label = _case(rows, vocab, 4.0, torch.bfloat16 if bf16 else torch.float32, seed)
    scheme = SparseScheme(top_k=min(vocab, 9), temperatures=GRID)
    whole = sparsify(logits, label, scheme)
    parts = [
        sparsify(logits[i : i + chunk], label[i : i + chunk], scheme) for i in range(0, rows, chunk)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_chunks_of_one_row_give_the_same_bits_on_several_threads() -> None:
    logits, label = _case(6, 49_152, 4.0, torch.float32, seed=5)
    scheme = SparseScheme(top_k=9, temperatures=GRID)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for chunk in (1, 2, 5, 6):
                pairs = zip(logits.split(chunk), label.split(chunk), strict=True)
                found.append(torch.cat([sparsify(z, g, scheme) for z, g in pairs]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, found[0]) for other in found)


def test_logits_are_left_as_they_are() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits, label = _case(3, 50, 2.0, dtype, seed=1)
        before = logits.clone()
        sparsify(logits, label, SparseScheme(top_k=4, temperatures=GRID))
        assert torch.equal(logits, before)


def test_extreme_but_finite_logits() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4, 5.0], [-1e4, -1e4, -1e4, -1e4]])
    targets, tail = _run(logits, torch.tensor([1, 2]), SparseScheme(2, GRID))
    assert targets.label_logprob_N.tolist() == pytest.approx([-1e4, -np.log(4)])
    assert tail.tolist() == pytest.approx([0, 0.5], abs=1e-6)
    assert targets.entropy_NG[0].tolist() == pytest.approx([0] * 4, abs=1e-6)
    assert targets.entropy_NG[1].tolist() == pytest.approx([np.log(4)] * 4)


def test_the_whole_vocabulary_leaves_no_tail() -> None:
    logits, label = _case(4, 30, 2.0, torch.float32, seed=2)
    _, tail = _run(logits, label, SparseScheme(top_k=30, temperatures=(1.0,)))
    assert ((tail >= 0) & (tail < 1e-6)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_named(bad: float) -> None:
    logits, label = _case(5, 30, 2.0, torch.float32, seed=3)
    logits[3, 17] = bad
    scheme = SparseScheme(top_k=2, temperatures=(1.0, 2.0))
    columns = sparsify(logits, label, scheme).numpy()
    with pytest.raises(ModelError, match="sample abc, supervised position 3, are not finite"):
        to_targets(columns, scheme, sample_id="abc", label_N=np.zeros(len(columns), np.int64))
    targets, _ = to_targets(columns[:3], scheme, sample_id="abc", label_N=np.zeros(3, np.int64))
    assert targets.num_positions == 3


def test_a_sequence_without_supervised_tokens() -> None:
    scheme = SparseScheme(top_k=2, temperatures=GRID)
    columns, label = np.zeros((0, scheme.num_columns), np.float32), np.zeros(0, np.int64)
    targets, tail = to_targets(columns, scheme, sample_id="s", label_N=label)
    assert targets.num_positions == tail.size == targets.token_ids_E.size == 0
    assert targets.log_z_NG.shape == targets.entropy_NG.shape == (0, 4)


def test_scheme_in_the_identity() -> None:
    scheme = SparseScheme(top_k=3, temperatures=(1.0, 2.0))
    assert scheme.to_json() == {"name": "top-k", "top_k": 3, "temperatures": [1.0, 2.0]}
    assert scheme.num_columns == 2 + 2 * 2 + 2 * 3


def test_rounding_puts_no_log_prob_above_0_and_no_entropy_below() -> None:
    scheme = SparseScheme(top_k=2, temperatures=(1.0,))
    tiny = np.float32(1e-7)
    columns_NC = np.array([[-1.0, 0.0, 0.0, -tiny, 4, 2, tiny, -20.0]], np.float32)
    targets, _ = to_targets(columns_NC, scheme, sample_id="s", label_N=np.array([4]))
    assert targets.token_ids_E.tolist() == [2, 4]
    assert targets.logprobs_E.tolist() == [-20.0, 0.0]
    assert targets.entropy_NG.tolist() == [[0.0]]
