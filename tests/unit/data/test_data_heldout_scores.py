"""Each token's scores go to its own sequence, its confidence to its own bin."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.collate import Batch, collate
from pipeline.evaluate.heldout import merge_scores, score_batches
from pipeline.evaluate.measures import HeldoutScores


@pytest.fixture
def rows(make_source: Callable[..., Any]) -> list[Any]:
    return [row for row in make_source([12], seed=3).rows[0] if row.targets.num_positions]


def _forward(batch: Batch) -> Any:
    """Return a cross-entropy that tells the sequence, and a student that is sure or not."""
    owner_N = batch.sample_index_N.float()
    sure_N = batch.sample_index_N % 2 == 0
    return SimpleNamespace(
        divergence_N=owner_N * 10, ce_N=owner_N + 1, argmax_N=batch.label_ids_N,
        argmax_logprob_N=torch.where(sure_N, 0.0, -2.0), acceptance_N=None,
    )  # fmt: skip


def test_of_several_sequences_in_a_batch(rows: list[Any]) -> None:
    scores = merge_scores([score_batches([collate(rows, temperature=1.0)], _forward)])
    number = {row.sample_id: place for place, row in enumerate(rows)}
    for place, name in enumerate(scores.sample_ids):
        tokens, own = scores.loss_tokens[place], number[name]
        assert tokens == rows[own].targets.num_positions
        assert scores.sums["cross_entropy"][place] == (own + 1) * tokens
        assert scores.sums["kl"][place] == 10 * own * tokens
    # A probability of 1 is in the last bin, and in no neighbour's first.
    sure = sum(row.targets.num_positions for row in rows[::2])
    unsure = sum(row.targets.num_positions for row in rows[1::2])
    counts = [count for _, _, count in scores.confidence_bins]
    wanted = np.zeros(len(counts), int)
    wanted[-1] = sure
    wanted[int(np.exp(-2.0) * len(counts))] += unsure
    assert counts == wanted.tolist()


def test_across_tokenizers_only_tokens_with_a_target_count() -> None:
    scores = HeldoutScores(
        ("a", "b"), (4, 6), {"uld": (1.0, 2.0), "cross_entropy": (8.0, 12.0)}, with_target=(1, 2)
    )
    assert scores.mean("uld").value == 1.0
    assert scores.mean("cross_entropy").value == 2.0
