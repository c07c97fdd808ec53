"""The report of a sweep: ranks, verdicts by paired differences, sentences, page, PNG, JSON."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluate.measures import HeldoutScores
from pipeline.report import Report, read_report, terminal_table, write_report
from pipeline.report.charts.png import sweep_png
from pipeline.report.data.compose_sweep import SweptRun, rank_points
from pipeline.report.html.page import render_page
from pipeline.report.text.sweep_text import objective_metric, sweep_headline, verdict_text
from tests.unit.report.sample import sample_sweep_report

_SEQUENCES = 60


def _scores(shift: float, noise: float, *, seed: int) -> HeldoutScores:
    """Texts of very different difficulty, the same in all runs; `shift` and `noise` on top."""
    difficulty, own = random.Random(0), random.Random(seed)
    loss_tokens = tuple(difficulty.randint(20, 80) for _ in range(_SEQUENCES))
    kl = tuple(
        n * (difficulty.uniform(0.1, 3.0) + shift + own.gauss(0, noise)) for n in loss_tokens
    )
    return HeldoutScores(
        sample_ids=tuple(f"{i:04d}" for i in range(_SEQUENCES)),
        loss_tokens=loss_tokens,
        sums={"kl": kl, "cross_entropy": kl, "top1_agreement": tuple(n * 0.5 for n in loss_tokens)},
    )


def _run(
    root: Path, label: str, scores: HeldoutScores | None, *, state: Any = "finished", **values: Any
) -> SweptRun:
    folder = root / label
    folder.mkdir()
    if scores is not None:
        (folder / "heldout-after.json").write_text(json.dumps(scores.to_json()))
        line = {"step": 4, "heldout/kl": scores.mean("kl").value, "train/loss": 2.0 + len(label)}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return SweptRun(label, folder, values, {k: str(v) for k, v in values.items()}, state)


def _ranked(runs: list[SweptRun], objective: str = "heldout/kl", maximize: bool = False) -> Any:
    return rank_points(
        runs, name="s", objective=objective, maximize=maximize, fields=("loss.alpha",)
    )


@pytest.fixture
def runs(tmp_path: Path) -> list[SweptRun]:
    return [
        _run(tmp_path, "worse", _scores(0.05, 0.02, seed=1), **{"loss.alpha": 0.2}),
        _run(tmp_path, "broken", None, state="failed", **{"loss.alpha": 9}),
        _run(tmp_path, "best", _scores(0.0, 0.02, seed=2), **{"loss.alpha": 0.5}),
        _run(tmp_path, "same", _scores(0.002, 0.02, seed=3), **{"loss.alpha": 0.6}),
    ]


def test_the_best_first_and_noise_told_from_difference(runs: list[SweptRun]) -> None:
    facts = _ranked(runs)
    assert [(p.label, p.rank, p.verdict) for p in facts.points] == [
        ("best", 1, "best"),
        ("same", 2, "within noise"),
        ("worse", 3, "worse"),
        ("broken", 0, ""),
    ]
    worse = facts.points[2]
    assert worse.objective is not None
    assert worse.objective.standard_error is not None
    assert worse.difference is not None
    assert worse.difference.standard_error is not None
    # Unpaired, 0.05 would drown in the difference between one text and the next.
    assert worse.objective.standard_error > 0.05 > 5 * worse.difference.standard_error
    assert worse.difference.paired
    assert worse.numbers == {"loss.alpha": 0.2}


def test_larger_can_be_better_and_other_metrics_have_no_error(runs: list[SweptRun]) -> None:
    assert _ranked(runs, maximize=True).points[0].label == "worse"
    facts = _ranked(runs, "train/loss")
    assert [p.label for p in facts.points[:3]] == ["best", "same", "worse"]
    assert facts.points[1].verdict == "not comparable"
    assert "this metric has no standard error" in sweep_headline(facts)


def test_rows_of_another_cache_are_not_paired(tmp_path: Path) -> None:
    one = _scores(0.0, 0.02, seed=1)
    other = replace(_scores(0.1, 0.02, seed=2), sample_ids=tuple(map(str, range(_SEQUENCES))))
    facts = _ranked([_run(tmp_path, "a", one), _run(tmp_path, "b", other)])
    assert facts.points[1].verdict == "not comparable"


def test_the_headline_answers_the_three_questions(runs: list[SweptRun]) -> None:
    text = sweep_headline(_ranked(runs))
    assert text.startswith("Use best: held-out KL to the teacher 1.")
    assert "But same is within noise of it (" in text
    assert "standard errors, paired over the same tokens" in text
    assert text.endswith("The others are clearly worse.")
    without = [run for run in runs if run.label != "same"]
    text = sweep_headline(_ranked(without))
    assert "nats better than worse, the next (" in text
    assert "Every other run is clearly worse." in text
    assert "It is the only run with a result." in sweep_headline(_ranked(runs[1:3]))
    assert sweep_headline(_ranked(runs[1:2])) == "No run of this sweep has a result."


def test_a_difference_says_its_sign_and_error(runs: list[SweptRun]) -> None:
    facts = _ranked(runs)
    metric = objective_metric(facts)
    assert verdict_text(facts.points[0], metric) == ""
    assert re.fullmatch(r"\+0\.0\d\d ± 0\.00\d", verdict_text(facts.points[2], metric))


def test_the_page_shows_every_run_and_why_some_have_no_result() -> None:
    report = sample_sweep_report(num_steps=60)
    assert report.sweep is not None
    page = render_page(report)
    for point in report.sweep.points:
        assert point.label in page
    assert "the loss is not finite at step 12" in page
    assert page.count(">within noise</span>") == 2, "in its column, and for phones"
    assert page.count('class="chart"') == 3 + 5 + 3
    assert "Where the configurations differ" in page
    assert report.title in page


@pytest.mark.parametrize("runs", [1, 2, 30])
def test_any_number_of_runs(runs: int) -> None:
    report = sample_sweep_report(num_steps=20, runs=runs)
    assert render_page(report)
    assert len(terminal_table(report).splitlines()) > runs
    assert max(map(len, terminal_table(report).splitlines())) <= 100


def test_the_json_holds_every_number_of_the_page(tmp_path: Path) -> None:
    report = sample_sweep_report(num_steps=20)
    write_report(report, tmp_path)
    assert read_report(tmp_path / "report.json") == report
    assert render_page(read_report(tmp_path / "report.json")) == render_page(report)
    assert {file.name for file in tmp_path.iterdir()} == {
        "report.json", "report.html", "loss.png", "kl.png", "sweep.png",
    }  # fmt: skip
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["sweep"]["points"][1]["difference"]["standard_error"] == 0.0031


def test_an_older_report_json_is_still_read() -> None:
    data = sample_sweep_report(num_steps=5).to_json()
    for name in ("sweep", "speeds", "setting_differences"):
        del data[name]
    assert Report.from_json(data).sweep is None


def test_the_picture_is_the_same_each_time() -> None:
    facts = sample_sweep_report(num_steps=5).sweep
    assert facts is not None
    picture = sweep_png(facts)
    assert picture is not None
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert sweep_png(facts) == picture
    assert sweep_png(replace(facts, points=facts.points[-2:])) is None
