"""The held-out KL of a top-k cache is the dense one, and a bound is named one.

Logits, sparsifier, codec, Parquet, reader, batches, scores: beside the KL in float64 over the whole
vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.writer import encode_shard
from pipeline.cache.layout.schema import table_to_rows
from pipeline.data.collate import Batch, collate
from pipeline.evaluate.heldout import merge_scores, score_batches
from pipeline.evaluate.measures import HeldoutScores
from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.reference import dense_kl
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from pipeline.sampling.noise import row_noise, sample_key
from pipeline.teacher.settings import CaptureSettings
from pipeline.teacher.sparsify.columns import to_targets
from pipeline.teacher.sparsify.device import sparsify
from pipeline.teacher.sparsify.scheme import capture_scheme

VOCAB, SEQUENCES, LENGTH = 700, 24, 64
SCHEME = capture_scheme(CaptureSettings(top_k=8))
assert SCHEME.heldout is not None
PLAIN = CodecSpec(VOCAB, quantisation=SCHEME.quantisation, largest_known=True)
SPEC = replace(
    PLAIN,
    heldout=replace(PLAIN, rule=SCHEME.heldout.rule, quantisation=SCHEME.heldout.quantisation),
)


def _logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the teacher's and the student's logits [S, N, V], of sharp and of flat rows.

    The largest two of the teacher's are nearly equal in every third row.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (SEQUENCES, LENGTH - 1, VOCAB)
    teacher = (
        torch.randn(shape, generator=generator) * torch.linspace(0.7, 3.0, LENGTH - 1)[:, None]
    )
    best = teacher.topk(2, -1)
    teacher[:, ::3].scatter_(-1, best.indices[:, ::3, 1:], best.values[:, ::3, :1] - 1e-3)
    return teacher, 0.8 * teacher + 0.6 * torch.randn(shape, generator=generator)


def _rows(teacher: torch.Tensor, split: str) -> list[CachedSequence]:
    """Write the teacher's targets into a shard of the split and read them back."""
    scheme, rows, tails = SCHEME.of_split(split), [], []
    ids_L = (np.arange(LENGTH) * 7 % VOCAB).astype(np.int32)
    for number, logits_NV in enumerate(teacher):
        name = hashlib.sha256(str(number).encode()).hexdigest()[:32]
        noise_N = torch.from_numpy(row_noise(sample_key(name), np.arange(LENGTH - 1)))
        label_N = torch.from_numpy(ids_L[1:].astype(np.int64))
        columns = sparsify(logits_NV, label_N, scheme, noise_N).numpy()
        targets, tail_N = to_targets(columns, scheme, sample_id=name, label_N=ids_L[1:])
        rows.append(CachedSequence(name, ids_L, np.arange(LENGTH) > 0, targets))
        tails.append(tail_N)
    _, data = encode_shard(
        rows, SPEC, split=split, index=0, temperatures=scheme.temperatures,
        identity_digest="0" * 64, tails=tails,
    )  # fmt: skip
    table = pq.read_table(pa.BufferReader(data))
    return table_to_rows(table, SPEC.of_split(split), scheme.temperatures)


def _scores(rows: list[CachedSequence], student: torch.Tensor, temperature: float) -> HeldoutScores:
    def forward(batch: Batch) -> Any:
        targets = HeadTargets(
            batch.ids_NK, batch.logprobs_NK, batch.inclusion_NK, batch.log_z_N, batch.entropy_N,
            batch.label_ids_N,
        )  # fmt: skip
        spec = LossSpec(
            temperature, 1.0, sampled_log_step=SPEC.of_split("heldout").quantisation.sampled_step
        )
        logits_NV = student.reshape(-1, VOCAB).double()
        return sparse_loss_(logits_NV, targets, spec, gradient=False, predictions=True)

    batch = collate(rows, temperature=temperature)
    return merge_scores([score_batches([batch], forward)])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_held_out_rows_give_the_dense_kl_and_training_rows_a_bound(temperature: float) -> None:
    teacher, student = _logits()
    flat_teacher, flat_student = (logits.reshape(-1, VOCAB) for logits in (teacher, student))
    dense = float(dense_kl(flat_student, flat_teacher, temperature=temperature).mean())
    held = _scores(_rows(teacher, "heldout"), student, temperature)
    found = held.mean("kl")
    assert found.value == pytest.approx(dense, rel=0.01)
    assert held.bounds == ()
    trained = _scores(_rows(teacher, "train"), student, temperature)
    assert trained.mean("kl").value < 0.9 * dense
    assert trained.bounds == tuple(name for name in ("kl", "acceptance") if name in trained.sums)
    assert HeldoutScores.from_json(trained.to_json()) == trained
    assert trained.to_json()["bounds"][0] == "kl"
    agreed = (flat_student.argmax(-1) == flat_teacher.argmax(-1)).double().mean()
    for scores in (held, trained):
        assert scores.mean("top1_agreement").value == pytest.approx(float(agreed))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_likeliest_token_is_the_teachers_at_every_position(split: str) -> None:
    teacher, _ = _logits()
    rows = _rows(teacher, split)
    for row, logits_NV in zip(rows, teacher, strict=True):
        targets = row.targets
        assert targets.largest_N is not None
        assert targets.largest_N.tolist() == logits_NV.argmax(-1).tolist()
        owner_E = np.repeat(np.arange(LENGTH - 1), targets.counts_N)
        is_it_E = targets.token_ids_E == targets.largest_N[owner_E]
        assert is_it_E.sum() == LENGTH - 1
        assert targets.inclusion_E is None or (targets.inclusion_E[is_it_E] == 1).all()
    stored = collate(rows, temperature=1.0)
    first_N = stored.ids_NK.gather(-1, stored.logprobs_NK.argmax(-1, keepdim=True))[:, 0]
    assert (first_N != teacher.reshape(-1, VOCAB).argmax(-1)).float().mean() > 0.05, "it matters"
