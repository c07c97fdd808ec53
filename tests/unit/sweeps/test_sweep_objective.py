"""The objective by the name that the runs log: one distance for all of them."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.api.settings import StudentRun
from pipeline.errors import ConfigError
from pipeline.loss.settings import LossSettings
from pipeline.student.metric_names import divergence_name, heldout_name
from pipeline.sweeps.objective import logged_objective, unmeasured
from pipeline.sweeps.space import Point


def _points(*losses: dict[str, Any]) -> list[Point]:
    return [Point({"loss": loss}, StudentRun.model_validate({"loss": loss})) for loss in losses]


def test_the_kl_over_a_top_k_is_bucketed() -> None:
    points = _points({}, {"temperature": 1.0})
    for part in ("heldout", "train"):
        assert logged_objective(f"{part}/kl", points, sampled=False) == f"{part}/kl_bucketed"
        assert logged_objective(f"{part}/kl", points, sampled=True) == f"{part}/kl"
    other = "heldout/cross_entropy"
    assert logged_objective(other, points, sampled=False) == other


def test_distances_that_do_not_compare() -> None:
    points = _points({}, {"divergence": "jensen_shannon"})
    with pytest.raises(ConfigError) as caught:
        logged_objective("train/kl", points, sampled=True)
    assert "found train/jensen_shannon, expected the objective of the sweep, train/kl" in str(
        caught.value
    )
    assert logged_objective("heldout/kl", points, sampled=True) == "heldout/kl"
    with pytest.raises(ConfigError, match="heldout/kl, expected"):
        logged_objective("heldout/kl_bucketed", points, sampled=True)


def test_an_objective_that_a_run_never_measures() -> None:
    points = [
        Point({"train": train}, StudentRun.model_validate({"train": train}))
        for train in ({}, {"evaluate": "never"})
    ]
    (line,) = unmeasured("heldout/kl", points)
    assert line.startswith(f"{points[1].label}: found train.evaluate never with the objective")
    assert unmeasured("train/loss", points) == []
    assert unmeasured("heldout/ece", points[:1]) == []


def test_names() -> None:
    across = LossSettings(cross_tokenizer="uld", temperature=1.0)
    assert heldout_name(across, sampled=False) == divergence_name(across, sampled=False) == "uld"
    assert divergence_name(LossSettings(tail="bucket"), sampled=True) == "kl_bucketed"
    assert heldout_name(LossSettings(tail="bucket"), sampled=True) == "kl"
    assert divergence_name(LossSettings(divergence="reverse_kl"), sampled=True) == "reverse_kl"
