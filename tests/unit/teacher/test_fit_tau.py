"""The rule is scaled to the wanted number of entries, once for all workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.corpus.sample import Sample
from pipeline.errors import CacheError, ConfigError
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.noise import row_noise
from pipeline.storage import Store
from pipeline.teacher.capture.fit_tau import FITTED_TAU, fit_scheme, scale_rule
from pipeline.teacher.sparsify.columns import to_targets
from pipeline.teacher.sparsify.device import SparseScheme, sparsify

GRID = (1.0, 2.0)
ROWS = 1500


def _columns(scheme: SparseScheme, rows: int = ROWS) -> np.ndarray:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(rows, 500, generator=generator) * 2.5
    label = torch.randint(500, (rows,), generator=generator)
    return sparsify(logits, label, scheme, torch.from_numpy(row_noise(1, np.arange(rows)))).numpy()


@pytest.mark.parametrize("taus", [(1 / 20, 0.0), (1 / 10, 1 / 20), (0.0, 1 / 15)])
@pytest.mark.parametrize("top_k", [0, 4])
@pytest.mark.parametrize("wanted", [8.0, 14.0, 30.0])
def test_the_scaled_rule_keeps_what_is_wanted(
    taus: tuple[float, float], top_k: int, wanted: float
) -> None:
    scheme = SparseScheme(top_k, GRID, InclusionRule(GRID, taus))
    rule = scale_rule(_columns(scheme), scheme, wanted)
    assert rule.taus[0] * taus[1] == pytest.approx(rule.taus[1] * taus[0], rel=1e-3)
    scaled = SparseScheme(top_k, GRID, rule)
    targets, _ = to_targets(
        _columns(scaled), scaled, sample_id="s", label_N=np.full(ROWS, 0, np.int64)
    )
    assert targets.counts_N.mean() == pytest.approx(wanted, rel=0.06)


def test_out_of_reach_is_refused() -> None:
    scheme = SparseScheme(0, GRID, InclusionRule(GRID, (1 / 10, 1 / 20)))
    columns = _columns(scheme)
    for wanted in (1.001, 4000.0):
        with pytest.raises(ConfigError, match="mean_entries"):
            scale_rule(columns, scheme, wanted)


def test_all_workers_agree_and_another_cache_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    scheme = SparseScheme(0, GRID, InclusionRule(GRID, (1 / 10, 1 / 20)))
    samples = [
        Sample(f"{i:032x}", "train", np.zeros(2, np.int32), np.array([False, True]), i, 0)
        for i in range(5)
    ]
    captured: list[int] = []

    def capture(chosen: list[Sample]) -> list[np.ndarray]:
        captured.append(len(chosen))
        return [_columns(scheme, 300)]

    def run(wanted: float, *, keep: bool = True) -> SparseScheme:
        return fit_scheme(
            scheme, wanted, store=store, samples=samples, identity={"a": 1}, capture=capture,
            keep=keep,
        )  # fmt: skip

    estimated = run(12.0, keep=False)
    assert not store.exists(FITTED_TAU)
    first = run(12.0)
    assert first == estimated
    assert captured == [5, 5]
    assert run(12.0) == first
    assert len(captured) == 2  # the second worker reads
    with pytest.raises(CacheError, match="its tau was fitted for another"):
        run(13.0)
    store.write(FITTED_TAU, b"{")
    with pytest.raises(CacheError, match="damaged"):
        run(12.0)


def test_the_loser_of_the_race_keeps_the_winners_result(tmp_path: Path) -> None:
    """Both found no file; the winner's logits differ in their last bits, and so do its taus."""
    store = Store(str(tmp_path))
    scheme = SparseScheme(0, GRID, InclusionRule(GRID, (1 / 10, 1 / 20)))
    sample = Sample("0" * 32, "train", np.zeros(2, np.int32), np.array([False, True]), 0, 0)

    def fit(capture: Callable[[list[Sample]], list[np.ndarray]]) -> SparseScheme:
        return fit_scheme(
            scheme, 12.0, store=store, samples=[sample], identity={"a": 1}, capture=capture
        )

    won: list[SparseScheme] = []

    def overtaken(_chosen: list[Sample]) -> list[np.ndarray]:
        won.append(fit(lambda _chosen: [_columns(scheme, 200)]))
        return [_columns(scheme, 400)]

    lost = fit(overtaken)
    alone = scale_rule(_columns(scheme, 400), scheme, 12.0)
    assert alone != won[0].rule
    assert lost == won[0]
