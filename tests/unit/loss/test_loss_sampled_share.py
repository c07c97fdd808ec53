"""What decides the variance of the estimate alone: no mean can show that it is wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.loss import sampled_divergence
from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.divergence import FDivergence
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets


@pytest.mark.parametrize(
    ("name", "parameter"),
    [("forward_kl", 0.0), ("jensen_shannon", 0.3), ("skew_kl", 0.2), ("skew_reverse_kl", 0.2)],
)
def test_the_cost_of_an_absent_token_is_the_limit_of_small_p(name: Any, parameter: float) -> None:
    divergence = FDivergence(name, parameter)
    log_q = torch.tensor([-1.0, -7.0], dtype=torch.float64)
    x, u = divergence.halves(torch.full_like(log_q, -60.0), log_q)
    torch.testing.assert_close((x + u) / log_q.exp(), torch.full_like(log_q, divergence.absent))
    assert FDivergence("reverse_kl").absent == math.inf


def test_the_share_goes_by_the_always_kept_entries_and_the_two_tails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """D over the always-kept and the rest as one; the spread a mean over them, weighted by p."""
    p_K = torch.tensor([0.3, 0.2, 0.05], dtype=torch.float64)  # the last one is drawn
    q_V = torch.tensor([0.1, 0.3, 0.15, 0.25, 0.2], dtype=torch.float64)
    targets = HeadTargets(
        torch.arange(3)[None], p_K.log()[None], torch.tensor([[1.0, 1.0, 0.4]]),
        torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    seen: list[tuple[float, float]] = []
    real = sampled_divergence.row_share

    def row_share(divergence_N: torch.Tensor, spread_N: torch.Tensor, *rest: float) -> torch.Tensor:
        seen.append((float(divergence_N), float(spread_N)))
        return real(divergence_N, spread_N, *rest)

    monkeypatch.setattr(sampled_divergence, "row_share", row_share)
    sparse_loss_(q_V.log()[None], targets, LossSpec(1.0, 1.0))
    ratio = (p_K[:2] / q_V[:2]).log()
    tail = 0.5 * math.log(0.5 / 0.6)
    assert seen == [
        pytest.approx(
            (float((p_K[:2] * ratio).sum()) + tail, float((p_K[:2] * ratio**2).sum()) / 0.5)
        )
    ]
