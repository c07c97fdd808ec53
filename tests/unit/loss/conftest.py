"""One thread, a generator per test, and random sparse targets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.loss.types import HeadTargets


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded afresh for every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def make_targets() -> Callable[..., tuple[HeadTargets, Tensor]]:
    """Give tests `_make_targets`; a fixture, so that no test imports a test."""
    return _make_targets


def _make_targets(
    generator: torch.Generator,
    *,
    tokens: int,
    vocab: int,
    counts: list[int] | None = None,
    temperature: float = 1.0,
    inclusion: bool = False,
    peak: float = 1.0,
) -> tuple[HeadTargets, Tensor]:
    """Return targets with `counts[n]` entries at token n (default: ragged) and dense log p."""
    logprobs_NV = torch.log_softmax(
        torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) * 2 * peak, dim=-1
    )
    if counts is None:
        counts = [1 + n % min(5, vocab) for n in range(tokens)]
    width = max(counts, default=0)
    # Padding points at token 0, as the collator's does: it must not hide the real token 0.
    ids_NK = torch.zeros(tokens, width, dtype=torch.int64)
    kept_NK = torch.full((tokens, width), -torch.inf)
    inclusion_NK = torch.ones(tokens, width)
    for n, count in enumerate(counts):
        ids = logprobs_NV[n].topk(count).indices.sort().values
        ids_NK[n, :count] = ids
        kept_NK[n, :count] = logprobs_NV[n, ids].float()
        inclusion_NK[n, :count] = torch.rand(count, generator=generator) * 0.7 + 0.3
    scaled_NV = torch.log_softmax(logprobs_NV / temperature, dim=-1)
    targets = HeadTargets(
        ids_NK=ids_NK,
        logprobs_NK=kept_NK,
        inclusion_NK=inclusion_NK if inclusion else None,
        log_z_N=torch.logsumexp(logprobs_NV / temperature, dim=-1).float(),
        entropy_N=-(scaled_NV.exp() * scaled_NV).sum(-1).float(),
        gold_N=torch.randint(0, vocab, (tokens,), generator=generator),
    )
    return targets, logprobs_NV
