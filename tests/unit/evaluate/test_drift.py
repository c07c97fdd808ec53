"""Drift from the writer: the held-out measure, its error, and the KL that it estimates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.collate import Batch, collate
from pipeline.evaluate.heldout import merge_scores, score_batches
from pipeline.evaluate.measures import ratio_mean
from tests.unit.cache.test_cache_written import _rows


def _forward(batch: Batch, label_logprob: float = -2.0) -> Any:
    """Return terms of a student with one log-prob of every written token."""
    number = batch.num_loss_tokens
    return SimpleNamespace(
        divergence_N=torch.zeros(number),
        ce_N=torch.full((number,), -label_logprob),
        argmax_N=batch.label_ids_N,
        argmax_logprob_N=torch.full((number,), -1.0),
        acceptance_N=None,
    )


def test_held_out_rows_report_it_where_the_cache_knows_the_writer() -> None:
    rows = [row for row in _rows(5) if row.targets.num_positions]
    scores = merge_scores([score_batches([collate(rows, temperature=1.0)], _forward)])
    written = {row.sample_id: row.targets.written_logprob_N for row in rows}
    sums = [float((written[name] + 2.0).sum()) for name in scores.sample_ids]  # type: ignore[operator]
    wanted = ratio_mean(sums, [len(written[name]) for name in scores.sample_ids])  # type: ignore[arg-type]
    found = scores.mean("written_drift")
    assert found.value == pytest.approx(wanted.value, rel=1e-6)
    assert found.standard_error == pytest.approx(wanted.standard_error, rel=1e-6)
    plain = [collate(rows[:1], temperature=1.0)]
    object.__setattr__(plain[0], "written_logprob_N", None)
    assert "written_drift" not in merge_scores([score_batches(plain, _forward)]).sums


def test_it_estimates_the_kl_of_writer_and_student() -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 1.5, (2, 50))
    log_q = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    exact = float((np.exp(log_q[0]) * (log_q[0] - log_q[1])).sum())
    rows = [draw.choice(50, int(n), p=np.exp(log_q[0])) for n in draw.integers(5, 60, 4000)]
    found = ratio_mean([float((log_q[0, r] - log_q[1, r]).sum()) for r in rows], [*map(len, rows)])
    assert abs(found.value - exact) < 4 * found.standard_error
    assert found.standard_error < 0.02
