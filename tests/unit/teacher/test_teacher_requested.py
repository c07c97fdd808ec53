"""Requested entries from logits to the loss: exact, counted once, and the rest unbiased."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.writer import encode_shard
from pipeline.cache.layout.schema import table_to_rows
from pipeline.corpus.sample import WrittenTokens
from pipeline.data.collate import collate
from pipeline.loss import reference
from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.noise import row_noise, sample_key
from pipeline.sampling.quantisation import rounding_log_bias
from pipeline.teacher.costs import cache_bytes
from pipeline.teacher.sparsify.columns import to_targets
from pipeline.teacher.sparsify.device import SparseScheme, sparsify
from pipeline.teacher.sparsify.requested import requested_entries, with_requested

GRID = (1.0, 2.0)
VOCAB, KINDS, REQUESTED = 60, 6, 8
SEQUENCES, LENGTH = 600, 19
SCHEMES = {
    "threshold": SparseScheme(0, GRID, InclusionRule(GRID, (1 / 4, 1 / 8))),
    "one temperature": SparseScheme(0, (1.0,), InclusionRule((1.0,), (1 / 8,))),
    "top-k-sampled": SparseScheme(3, GRID, InclusionRule(GRID, (1 / 4, 1 / 8))),
    "top-k": SparseScheme(4, GRID),
}
KINDS_N = np.arange(LENGTH - 1) % KINDS


@cache
def _case() -> tuple[Tensor, Tensor, np.ndarray]:
    """Return the teacher's and the student's logits [KINDS, V], and the student's top ids."""
    generator = torch.Generator().manual_seed(0)
    teacher_KV = torch.randn(KINDS, VOCAB, generator=generator)
    teacher_KV *= torch.linspace(0.3, 3.0, KINDS)[:, None]
    student_KV = 0.6 * teacher_KV + torch.randn(KINDS, VOCAB, generator=generator) * 1.5
    return teacher_KV, student_KV, student_KV.topk(REQUESTED).indices.numpy().astype(np.int32)


@cache
def _cached(name: str, asked: bool = True, sequences: int = SEQUENCES) -> list[CachedSequence]:
    """Write sequences of the same logits under names of their own, and read them back."""
    scheme, (teacher_KV, _, top_KR) = SCHEMES[name], _case()
    logits_NV, top_NR = teacher_KV[KINDS_N], top_KR[KINDS_N]
    top_NR[0, :2] = (-1, VOCAB + 3)  # no token, and one that only the writer has
    ids_L = np.concatenate([[0], 10 + KINDS_N]).astype(np.int32)
    label_N = torch.from_numpy(ids_L[1:].astype(np.int64))
    rows, tails = [], []
    for number in range(sequences):
        sample_id = hashlib.sha256(str(number).encode()).hexdigest()[:32]
        noise_N = torch.from_numpy(row_noise(sample_key(sample_id), np.arange(LENGTH - 1)))
        columns = sparsify(logits_NV, label_N, scheme, noise_N)
        written = None
        if asked:
            ids_NR = torch.from_numpy(top_NR.astype(np.int64))
            columns = with_requested(columns, logits_NV, label_N, ids_NR)
            written = WrittenTokens(None, top_NR)
        targets, tail_N = to_targets(
            columns.numpy(), scheme, sample_id=sample_id, label_N=label_N.numpy(), written=written
        )
        rows.append(CachedSequence(sample_id, ids_L, np.arange(LENGTH) > 0, targets))
        tails.append(tail_N)
    spec = CodecSpec(VOCAB, scheme.rule, scheme.quantisation, requested_entries=asked)
    record, data = encode_shard(
        rows, spec, split="train", index=0, temperatures=scheme.temperatures,
        identity_digest="0" * 64, tails=tails,
    )  # fmt: skip
    found = table_to_rows(pq.read_table(pa.BufferReader(data)), spec, scheme.temperatures)
    assert record.entries == sum(int(row.targets.counts_N.sum()) for row in found)
    return found


def _targets(rows: list[CachedSequence], temperature: float) -> HeadTargets:
    batch = collate(rows, temperature=temperature)
    return HeadTargets(
        batch.ids_NK, batch.logprobs_NK, batch.inclusion_NK, batch.log_z_N, batch.entropy_N,
        batch.label_ids_N,
    )  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_each_is_there_once_and_known(name: str) -> None:
    teacher_KV, _, top_KR = _case()
    log_p_KV = torch.log_softmax(teacher_KV.double(), -1).numpy()
    row, bare = _cached(name, sequences=1)[0].targets, _cached(name, False, sequences=1)[0].targets
    assert row.requested_E is not None
    starts = np.concatenate([[0], np.cumsum(row.counts_N)])
    for n, kind in enumerate(KINDS_N):
        part = slice(starts[n], starts[n + 1])
        ids, exact = row.token_ids_E[part], log_p_KV[kind]
        assert len(set(ids.tolist())) == len(ids)
        asked = set(top_KR[kind][2 if n == 0 else 0 :].tolist())
        assert asked <= set(ids.tolist())
        others, _ = bare.entries(n)
        assert set(ids.tolist()) == asked | set(others.tolist())
        for token, value, new in zip(ids, row.logprobs_E[part], row.requested_E[part], strict=True):
            pi = 1.0 if row.inclusion_E is None else row.inclusion_E[part][list(ids).index(token)]
            if token in asked:
                assert pi == 1
            if new:
                assert token in asked
                assert abs(value - exact[token]) < 0.015 * (0.05 - exact[token])
    # Those that a scheme keeps anyway are not the writer's; a bare cache has none.
    assert row.requested_E.sum() < REQUESTED * (LENGTH - 1)
    assert bare.requested_E is None


@pytest.mark.parametrize(
    ("name", "temperature"),
    [(name, t) for name, s in SCHEMES.items() if s.rule for t in s.temperatures],
)
def test_the_sampled_rest_is_unbiased_without_them(name: str, temperature: float) -> None:
    """Of many seeds, sums over the tokens that are neither kept nor asked for; z below 4."""
    rows, (teacher_KV, student_KV, _) = _cached(name), _case()
    targets, number = _targets(rows, temperature), LENGTH - 1
    assert targets.inclusion_NK is not None
    step = SCHEMES[name].quantisation.sampled_step
    log_p_NK = targets.logprobs_NK.double() / temperature - targets.log_z_N.double()[:, None]
    sampled_NK = torch.isfinite(log_p_NK) & (targets.inclusion_NK < 1)
    weight_NK = log_p_NK.exp() / targets.inclusion_NK.double()
    weight_NK *= np.exp(-rounding_log_bias(step, temperature))
    log_q_KV = torch.log_softmax(student_KV.double() / temperature, -1)
    known = {
        n: set(targets.ids_NK[n][(targets.inclusion_NK[n] == 1) & log_p_NK[n].isfinite()].tolist())
        for n in range(number)
    }
    scores = []
    for n, kind in enumerate(KINDS_N):
        g_V = log_q_KV[kind] ** 2
        at = slice(n, None, number)
        drawn_S = (weight_NK[at] * g_V[targets.ids_NK[at]]).masked_fill(~sampled_NK[at], 0).sum(-1)
        rest = [token for token in range(VOCAB) if token not in known[n]]
        log_p_V = torch.log_softmax(teacher_KV[kind].double(), -1) / temperature
        p_V = (log_p_V - float(targets.log_z_N[n])).exp()
        error_S = drawn_S - (p_V * g_V)[rest].sum()
        scores.append(float(error_S.mean() / (error_S.std() / len(error_S) ** 0.5)))
    assert max(map(abs, scores)) < 4, scores
    # The test can fail: all sampled entries, as if nobody had asked, count some tokens twice.
    bare = _targets(_cached(name, False), temperature)
    assert bare.inclusion_NK is not None
    twice = (bare.inclusion_NK < 1).sum() - (targets.inclusion_NK < 1).sum()
    assert int(twice) > SEQUENCES


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.rule])
def test_the_mean_gradient_is_the_dense_one(name: str) -> None:
    """With what the codes say of the known entries, and the exact p of all others."""
    rows, (teacher_KV, student_KV, _) = _cached(name), _case()
    targets, number = _targets(rows, 1.0), LENGTH - 1
    assert targets.inclusion_NK is not None
    grad_NV = student_KV.double()[KINDS_N].repeat(len(rows), 1)
    step = SCHEMES[name].quantisation.sampled_step
    sparse_loss_(grad_NV, targets, LossSpec(1.0, 1.0, sampled_log_step=step))
    for n, kind in enumerate(KINDS_N):
        p_V = torch.softmax(teacher_KV[kind].double(), -1)
        for token, log_p, pi in zip(
            targets.ids_NK[n], targets.logprobs_NK[n], targets.inclusion_NK[n], strict=True
        ):
            if pi == 1 and torch.isfinite(log_p):
                p_V[token] = log_p.double().exp()
        wanted_V = p_V.sum() * torch.softmax(student_KV[kind].double(), -1) - p_V
        errors_SV = grad_NV[n::number] - wanted_V
        spread_V = errors_SV.std(0) / len(errors_SV) ** 0.5
        # A token of p = 1e-3 is in few of the samples, or none, whose spread then says nothing.
        scores_V = (errors_SV.mean(0).abs() / spread_V)[p_V > 0.005]
        assert scores_V.max() < 4, (kind, n)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon", "skew_reverse_kl"])
@pytest.mark.parametrize("name", ["top-k", "threshold"])
def test_what_weighs_by_the_student_is_exact_where_it_has_its_mass(
    name: str, divergence: str
) -> None:
    """Divergences over the bucket: nearer the dense one by what is known of the student's ids."""
    teacher_KV, student_KV, _ = _case()
    spec = LossSpec(1.0, 1.0, "bucket", divergence)  # type: ignore[arg-type]
    dense_N = reference.dense_divergence(
        student_KV[KINDS_N], torch.log_softmax(teacher_KV.double(), -1)[KINDS_N], spec
    )
    errors = []
    for asked in (True, False):
        targets = _targets(_cached(name, asked, sequences=1), 1.0)
        terms = sparse_loss_(student_KV.double()[KINDS_N].clone(), targets, spec, gradient=False)
        errors.append(float((terms.divergence_N - dense_N).abs().mean() / dense_N.mean()))
    assert errors[0] < 0.5 * errors[1], errors


def test_a_ruled_out_token_and_broken_logits() -> None:
    logits_RV = torch.tensor([[1.0, 2.0, -1e30, 0.5], [0.0, torch.nan, 1.0, 2.0]])
    label_R = torch.tensor([0, 3])
    scheme = SparseScheme(2, (1.0,))
    ids_RK = torch.tensor([[2, 1, -1], [0, 9, 2]])
    columns = with_requested(sparsify(logits_RV, label_R, scheme), logits_RV, label_R, ids_RK)
    assert columns.shape == (2, scheme.num_columns + 3)
    log_p = torch.log_softmax(logits_RV[0], -1)
    np.testing.assert_allclose(columns[0, -3:], [-64.0, float(log_p[1]), 1.0], rtol=1e-6)
    assert torch.isnan(columns[1, -3:]).tolist() == [True, False, True]
    found = requested_entries(ids_RK.numpy(), columns[:, -3:].numpy()[:1].repeat(2, 0))
    assert found.counts_N.tolist() == [2, 2]
    none = requested_entries(np.zeros((0, 3), np.int32), np.zeros((0, 0), np.float32))
    assert none.counts_N.shape == (0,)


def test_another_tokenizer_s_loss_sees_the_head_alone() -> None:
    from pipeline.data.retokenise import _head_of_distribution

    for name in ("top-k", "threshold"):
        asked, bare = (_cached(name, flag, sequences=1)[0].targets for flag in (True, False))
        kept, wanted = _head_of_distribution(asked), _head_of_distribution(bare)
        assert asked.token_ids_E[kept].tolist() == bare.token_ids_E[wanted].tolist()
        assert _head_of_distribution(replace(asked, requested_E=None)).sum() > kept.sum()


def test_the_forecast_of_the_size_knows_what_a_writer_records() -> None:
    sizes = [
        cache_bytes(SCHEMES["threshold"], tokens=2000, loss_tokens=1000, generate=generate)
        for generate in (
            None,
            {"record_logprobs": False},
            {"record_logprobs": True, "record_top_k": 0},
            {"record_logprobs": True, "record_top_k": 10},
        )
    ]
    assert sizes[0] == sizes[1]
    assert sizes[2] == pytest.approx(sizes[1] + 1900, abs=1)
    assert sizes[3] == pytest.approx(sizes[2] + 16_000, abs=1)


def test_an_id_that_is_no_token_has_no_entry_and_others_their_own_log_prob() -> None:
    logits_RV = torch.tensor([[1.0, 2.0, -3.0, 0.5], [0.0, 4.0, 1.0, 2.0]])
    label_R, ids_RK = torch.tensor([0, 3]), torch.tensor([[2, 1, -1], [0, 4, 3]])
    scheme = SparseScheme(2, (1.0,))
    columns = with_requested(sparsify(logits_RV, label_R, scheme), logits_RV, label_R, ids_RK)
    log_p_RV = torch.log_softmax(logits_RV, -1)
    wanted = [[log_p_RV[0, 2], log_p_RV[0, 1], 1.0], [log_p_RV[1, 0], 1.0, log_p_RV[1, 3]]]
    np.testing.assert_allclose(columns[:, -3:], wanted, rtol=1e-5)
    found = requested_entries(ids_RK.numpy(), columns[:, -3:].numpy())
    assert found.counts_N.tolist() == [2, 2]
    assert found.token_ids_E.tolist() == [2, 1, 0, 3]
