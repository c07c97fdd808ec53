"""Logits -> columns -> codec -> Parquet -> reader -> batch -> loss: right on average, all of it.

What each part promises alone is tested beside it; here one cached target after the other is sampled
from the same few distributions, and the mean over all of them has to be the dense loss.
"""

from __future__ import annotations

import hashlib
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
from pipeline.data.collate import collate
from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.noise import row_noise, sample_key
from pipeline.teacher.sparsify.columns import to_targets
from pipeline.teacher.sparsify.device import SparseScheme, sparsify

GRID = (1.0, 2.0)
VOCAB = 80
KINDS = 8
"""Distributions, from nearly certain to flat, which follow each other in every sequence."""
SEQUENCES, LENGTH = 512, 64
SCHEMES = {
    "threshold": SparseScheme(0, GRID, InclusionRule(GRID, (1 / 4, 1 / 8))),
    "threshold, one temperature": SparseScheme(0, (1.0,), InclusionRule((1.0,), (1 / 8,))),
    "threshold, one temperature, two phases": SparseScheme(
        0, (1.0,), InclusionRule((1.0,), (1 / 8,)), oversampling=4.0
    ),
    "top-k-sampled, two phases": SparseScheme(
        3, GRID, InclusionRule(GRID, (1 / 4, 1 / 8)), oversampling=3.0
    ),
    "top-k-sampled": SparseScheme(3, GRID, InclusionRule(GRID, (1 / 4, 1 / 8))),
}


@cache
def _case() -> tuple[Tensor, Tensor]:
    """Return the teacher's and the student's logits [KINDS, V]."""
    generator = torch.Generator().manual_seed(0)
    teacher_KV = torch.randn(KINDS, VOCAB, generator=generator)
    teacher_KV *= torch.linspace(0.3, 4.0, KINDS)[:, None]
    return teacher_KV, 0.8 * teacher_KV + torch.randn(KINDS, VOCAB, generator=generator) * 0.7


@cache
def _cached(name: str) -> tuple[CachedSequence, ...]:
    """Write many sequences of the same logits under names of their own, and read them back."""
    scheme = SCHEMES[name]
    kinds_N = np.arange(LENGTH - 1) % KINDS
    logits_NV = _case()[0][kinds_N]
    ids_L = np.concatenate([[0], 10 + kinds_N]).astype(np.int32)  # label differs by kind
    loss_mask_L = np.arange(LENGTH) > 0
    label_N = torch.from_numpy(ids_L[1:].astype(np.int64))
    rows, tails = [], []
    for number in range(SEQUENCES):
        sample_id = hashlib.sha256(str(number).encode()).hexdigest()[:32]
        noise_N = torch.from_numpy(row_noise(sample_key(sample_id), np.arange(LENGTH - 1)))
        columns = sparsify(logits_NV, label_N, scheme.first_phase, noise_N).numpy()
        targets, tail_N = to_targets(
            columns, scheme, sample_id=sample_id, label_N=label_N.numpy(),
            rows_N=np.arange(LENGTH - 1),
        )  # fmt: skip
        rows.append(CachedSequence(sample_id, ids_L, loss_mask_L, targets))
        tails.append(tail_N)
    spec = CodecSpec(VOCAB, scheme.rule, scheme.quantisation)
    _, data = encode_shard(
        rows, spec, split="train", index=0, temperatures=scheme.temperatures,
        identity_digest="0" * 64, tails=tails,
    )  # fmt: skip
    return tuple(table_to_rows(pq.read_table(pa.BufferReader(data)), spec, scheme.temperatures))


def _errors(name: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Return KL [S, N] and its gradient [S, N, V] on the logits over T, each less the dense one."""
    rows = _cached(name)
    batch = collate(rows, temperature=temperature)
    teacher_KV, student_KV = (logits_KV.double() for logits_KV in _case())
    kinds_N = torch.arange(LENGTH - 1) % KINDS
    grad_NV = student_KV[kinds_N].repeat(len(rows), 1)
    spec = LossSpec(temperature, 1.0, sampled_log_step=SCHEMES[name].quantisation.sampled_step)
    targets = HeadTargets(
        batch.ids_NK, batch.logprobs_NK, batch.inclusion_NK, batch.log_z_N, batch.entropy_N,
        batch.label_ids_N,
    )  # fmt: skip
    terms = sparse_loss_(grad_NV, targets, spec)
    p_KV = torch.softmax(teacher_KV / temperature, -1)
    q_KV = torch.softmax(student_KV / temperature, -1)
    kl_K = (p_KV * (p_KV.log() - q_KV.log())).sum(-1)
    shape = (len(rows), LENGTH - 1)
    return (
        terms.divergence_N.reshape(shape) - kl_K[kinds_N],
        (grad_NV / temperature).reshape(*shape, VOCAB) - (q_KV - p_KV)[kinds_N],
    )


@pytest.mark.parametrize("part", ["value", "gradient"])
@pytest.mark.parametrize(
    ("name", "temperature"),
    [(name, t) for name, scheme in SCHEMES.items() for t in scheme.temperatures],
)
def test_the_mean_over_draws_is_the_dense_loss(name: str, temperature: float, part: str) -> None:
    errors_SN = _errors(name, temperature)[part == "gradient"]
    for kind in range(KINDS):
        errors_R = errors_SN[:, kind::KINDS].reshape(SEQUENCES * len(range(kind, 63, KINDS)), -1)
        mean, error = errors_R.mean(0), errors_R.std(0) / len(errors_R) ** 0.5
        # Beyond five standard errors, what the grids leave of a distribution always the same: of
        # always-kept log p (an error of p below 1 % of 1), and of log Z where T is not 1 (0.8 %).
        left = 0.012
        if part == "value":
            left = 0.002 + 0.02 * _always_kept_mass(name, kind) + 0.008 * (temperature != 1)
        assert (mean.abs() <= 5 * error + left).all(), (kind, (mean.abs() - 5 * error).max())


def _always_kept_mass(name: str, kind: int) -> float:
    """Return the mass of the entries that are always kept."""
    targets = _cached(name)[0].targets
    part = slice(*np.cumsum([0, *targets.counts_N])[kind : kind + 2])
    assert targets.inclusion_E is not None
    return float(np.exp(targets.logprobs_E[part])[targets.inclusion_E[part] == 1].sum())


@pytest.mark.parametrize("part", ["value", "gradient"])
@pytest.mark.parametrize(
    ("name", "temperature"),
    [(name, t) for name, scheme in SCHEMES.items() for t in scheme.temperatures],
)
def test_the_error_falls_with_the_root_of_the_draws(
    name: str, temperature: float, part: str
) -> None:
    """Of 256 times as many draws it is 16 times smaller, less what the grids leave."""
    errors_SN = _errors(name, temperature)[part == "gradient"]
    errors_SX = errors_SN.reshape(SEQUENCES, LENGTH - 1, -1)[:, : LENGTH - LENGTH % KINDS - KINDS]
    quantisation_X = errors_SX.mean(0)

    def error(size: int) -> float:
        return float(
            (errors_SX - quantisation_X).unflatten(0, (-1, size)).mean(1).square().mean().sqrt()
        )

    assert error(16) / error(1) == pytest.approx(1 / 4, rel=0.12)
    assert error(64) / error(1) == pytest.approx(1 / 8, rel=0.2)
    assert float(quantisation_X.square().mean().sqrt()) < error(1) / 3
