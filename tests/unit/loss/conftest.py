"""One thread, a generator per test, random sparse targets, and a sampler."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.loss.targets import HeadTargets
from pipeline.sampling.inclusion import InclusionRule


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded again for every test."""
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
        # About half of the entries are always kept.
        inclusion_NK[n, :count] = (torch.rand(count, generator=generator) * 1.4 + 0.3).clamp(max=1)
    scaled_NV = torch.log_softmax(logprobs_NV / temperature, dim=-1)
    targets = HeadTargets(
        ids_NK=ids_NK,
        logprobs_NK=kept_NK,
        inclusion_NK=inclusion_NK if inclusion else None,
        log_z_N=torch.logsumexp(logprobs_NV / temperature, dim=-1).float(),
        entropy_N=-(scaled_NV.exp() * scaled_NV).sum(-1).float(),
        label_N=torch.randint(0, vocab, (tokens,), generator=generator),
    )
    return targets, logprobs_NV


@pytest.fixture(scope="session")
def draw_targets() -> Callable[..., HeadTargets]:
    """Give tests `_draw_targets`; a fixture, so that no test imports a test."""
    return _draw_targets


def _draw_targets(
    logprobs_V: NDArray[np.float64],
    rule: InclusionRule,
    *,
    temperature: float,
    draws: int,
    seed: int,
    label: int = 0,
    log_step: float = 0.0,
) -> HeadTargets:
    """Sample one distribution's tail `draws` times, each token independently; a row per sample.

    As in a cache, the label is always kept. With `log_step`, log p of the other tokens is rounded
    with a dither for each sample, and the inclusion probability is that of the rounded value.
    """
    rng = np.random.default_rng(seed)
    vocab = len(logprobs_V)
    log_z_G = [np.logaddexp.reduce(logprobs_V / t) for t in rule.temperatures]
    log_z_VG = np.tile(log_z_G, (vocab, 1))
    always_kept_V = rule.ratio(logprobs_V, log_z_VG) >= 1
    always_kept_V[label] = True
    logprobs_RV = np.tile(logprobs_V, (draws, 1))
    if log_step:
        dither_R1 = rng.random((draws, 1)) - 0.5
        rounded_RV = (np.rint(logprobs_RV / log_step + dither_R1) - dither_R1) * log_step
        logprobs_RV = np.where(always_kept_V, logprobs_RV, rounded_RV)
    inclusion_RV = rule.inclusion(logprobs_RV.reshape(-1), np.tile(log_z_G, (vocab * draws, 1)))
    inclusion_RV = np.where(always_kept_V, 1.0, inclusion_RV.reshape(draws, vocab))
    kept_RV = rng.random((draws, vocab)) < inclusion_RV
    width = int(kept_RV.sum(1).max())
    order_RK = np.argsort(~kept_RV, axis=1, kind="stable")[:, :width]
    there_RK = np.take_along_axis(kept_RV, order_RK, axis=1)
    column = rule.temperatures.index(temperature)

    def taken(table_RV: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.take_along_axis(table_RV, order_RK, axis=1)

    return HeadTargets(
        ids_NK=torch.from_numpy(np.where(there_RK, order_RK, 0)),
        logprobs_NK=torch.from_numpy(np.where(there_RK, taken(logprobs_RV), -np.inf)),
        inclusion_NK=torch.from_numpy(np.where(there_RK, taken(inclusion_RV), 1.0)),
        log_z_N=torch.full((draws,), log_z_G[column], dtype=torch.float64),
        entropy_N=torch.zeros(draws, dtype=torch.float64),
        label_N=torch.full((draws,), label),
    )
