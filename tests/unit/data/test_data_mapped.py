"""Mapped rows through collator and loss: value and gradient in float64, by hand."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pytest
import torch

from pipeline.cache.codec.targets import CachedSequence, SparseTargets
from pipeline.data.collate import collate
from pipeline.data.mapped import MappedRows
from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from pipeline.models.vocabulary import map_vocabulary

V, N, K = 12, 5, 6
TEACHER = {f"p{i}": i for i in range(V)}
# Other ids, two of the teacher's pieces missing, three of its own, and one beyond the head.
STUDENT = {f"p{i}": (7 * i + 3) % 11 for i in range(1, V - 1)} | {"x": 3, "y": 11, "z": 12}
HEAD = 12


class _Row:
    def __init__(self, row: CachedSequence) -> None:
        self.row = row

    def shard_rows(self) -> list[int]:
        return [1]

    def shard_sizes(self, _shard: int) -> np.ndarray:
        sizes = (len(self.row.input_ids_L), self.row.targets.num_positions)
        return np.asarray([sizes], np.int32)

    def keep(self, shards: Collection[int]) -> None:
        pass

    def shard_name(self, shard: int) -> str:
        return f"shard {shard}"

    def open(self, shard: int) -> None:
        pass

    def reading(self) -> list[str]:
        return []

    def read_rows(self, _shard: int, rows: Sequence[int]) -> list[CachedSequence]:
        return [self.row for _ in rows]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient_are_those_of_the_pieces(temperature: float) -> None:
    rng = np.random.default_rng(1)
    p_NV = rng.dirichlet(np.full(V, 0.4), size=N)
    ids_NK = np.sort(np.argsort(-p_NV, axis=1)[:, :K], axis=1)
    log_z_NG = np.stack([np.zeros(N), np.log((p_NV ** (1 / 2)).sum(1))], axis=1)
    inputs = np.asarray([1, 5, 2, 9, 4, 3], np.int32)
    row = CachedSequence(
        sample_id="0" * 32,
        input_ids_L=inputs,
        loss_mask_L=np.asarray([0, 1, 1, 1, 1, 1], np.bool_),
        targets=SparseTargets(
            counts_N=np.full(N, K, np.int32),
            token_ids_E=ids_NK.reshape(-1).astype(np.int32),
            logprobs_E=np.log(np.take_along_axis(p_NV, ids_NK, 1)).reshape(-1).astype(np.float32),
            inclusion_E=None,
            temperatures=(1.0, 2.0),
            log_z_NG=log_z_NG.astype(np.float32),
            entropy_NG=np.zeros((N, 2), np.float32),
            label_logprob_N=np.zeros(N, np.float32),
        ),
    )
    mapping = map_vocabulary(TEACHER, STUDENT, head_rows=HEAD)
    assert mapping.size == HEAD
    assert set(mapping.missing) == {"p0", "p11"}
    rows = MappedRows(_Row(row), mapping.apply, mapping.size, str).read_rows(0, [0])
    batch = collate(rows, temperature=temperature)
    assert batch.label_ids_N.tolist() == [STUDENT[f"p{i}"] for i in inputs[1:]]
    assert (batch.ids_NK >= HEAD).any(), "entries without a piece of the student"
    generator = torch.Generator().manual_seed(0)
    logits_NU = torch.randn(N, HEAD, generator=generator, dtype=torch.float64)
    alpha = 0.6

    # By hand: each cached piece that the student has is an outcome, all the rest is one.
    wanted_NU = logits_NU.clone().requires_grad_()
    log_q_NU = torch.log_softmax(wanted_NU / temperature, -1)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(N):
        rest_p = torch.ones((), dtype=torch.float64)
        rest = torch.ones(HEAD, dtype=torch.bool)
        for i in ids_NK[n].tolist():
            number = STUDENT.get(f"p{i}")
            if number is None:
                continue
            column = 0 if temperature == 1 else 1
            p = float(p_NV[n, i]) ** (1 / temperature) / np.exp(log_z_NG[n, column])
            total = total + p * (np.log(p) - log_q_NU[n, number])
            rest_p, rest[number] = rest_p - p, False
        total = total + rest_p * (rest_p.log() - log_q_NU[n][rest].logsumexp(0))
    label_N = torch.tensor([STUDENT[f"p{i}"] for i in inputs[1:]])
    entropy = torch.nn.functional.cross_entropy(wanted_NU, label_N, reduction="sum")
    loss = alpha * temperature**2 * total + (1 - alpha) * entropy
    loss.backward()

    targets = HeadTargets(
        batch.ids_NK, batch.logprobs_NK, None, batch.log_z_N, batch.entropy_N, batch.label_ids_N
    )
    found_NU = logits_NU.clone()
    terms = sparse_loss_(found_NU, targets, LossSpec(temperature, alpha))
    found = alpha * temperature**2 * terms.divergence_N.sum() + (1 - alpha) * terms.ce_N.sum()
    # The cache's values are float32.
    assert float(found) == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(found_NU, wanted_NU.grad, rtol=0, atol=1e-6)
