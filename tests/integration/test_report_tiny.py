"""Reports from what real runs left: one student, a sweep, and a folder that has neither."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluate.measures import HeldoutScores, paired_difference
from pipeline.sweeps.ledger import Entry, Ledger
from tests.conftest import Stage


@pytest.fixture
def sweep(tiny_run: Path, tiny_cache: Path, tmp_path: Path) -> Path:
    """Return a sweep of two runs, one of them somewhat worse, and of one that failed."""
    folder = tmp_path / "sweep"
    for name in ("good", "worse"):
        shutil.copytree(tiny_run, folder / "runs" / name)
    worse = folder / "runs/worse"
    scores = json.loads((worse / "heldout-after.json").read_text())
    scores["sums"]["kl"] = [1.5 * value for value in scores["sums"]["kl"]]
    (worse / "heldout-after.json").write_text(json.dumps(scores))
    config = worse / "config.yaml"
    config.write_text(config.read_text().replace(" temperature: 1.0", " temperature: 2.0"))
    entries = [
        Entry(name, f"temperature {value:g}", {"loss.temperature": value}, "finished", 1.0, 60.0)
        for name, value in (("worse", 2.0), ("good", 1.0))
    ]
    lost = Entry("lost", "temperature 9", {"loss.temperature": 9.0}, "failed", error="exit code 1")
    Ledger(
        "two", "two.yaml", str(tiny_cache), "heldout/kl", False, ("loss.temperature",),
        "make sweep SWEEP=two.yaml", (*entries, lost),
    ).write(folder)  # fmt: skip
    return folder


def _report(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "report/report.json").read_text())
    return data


def test_a_sweep(sweep: Path, stage: Stage) -> None:
    result = stage("report", ["--run_dir", sweep]).ok()
    assert result.out.lstrip().startswith("Use temperature 1: held-out KL ")
    report = _report(sweep)
    good, worse, lost = report["sweep"]["points"]
    assert [point["label"] for point in (good, worse, lost)] == [
        "temperature 1", "temperature 2", "temperature 9",
    ]  # fmt: skip
    one, other = (
        HeldoutScores.read(str(sweep / "runs" / name / "heldout-after.json"))
        for name in ("worse", "good")
    )
    expected = paired_difference(one, other, "kl")
    assert worse["difference"]["value"] == pytest.approx(expected.value)
    assert worse["difference"]["standard_error"] == pytest.approx(expected.standard_error)
    assert good["before"]["value"] > good["objective"]["value"]
    assert lost["error"] == "exit code 1"
    assert [row["name"] for row in report["rows"]] == [
        "temperature 1", "temperature 2", "student before", "teacher",
    ]  # fmt: skip
    # Curves of both on one axis, speeds, what differs, and texts.
    names = {(curve["name"], curve["series"]) for curve in report["curves"]}
    assert {("held-out KL", f"temperature {value}") for value in (1, 2)} <= names
    assert {speed["seconds"] for speed in report["speeds"]} == {60.0}
    assert all(0 <= speed["wait_share"] <= 1 for speed in report["speeds"])
    assert report["setting_differences"] == [
        {
            "field": "loss.temperature",
            "values_by_run": {"temperature 1": "1.0", "temperature 2": "2.0"},
        }
    ]
    texts = report["generations"][0]["texts"]
    assert list(texts) == ["teacher", "student before", "best: temperature 1"]
    tokens = [token for token in report["passages"][0]["tokens"] if token["kl"] is not None]
    assert all(len(token["student_top"]) == len(token["teacher_top"]) == 5 for token in tokens)
    page = (sweep / "report/report.html").read_text()
    assert "make sweep SWEEP=two.yaml" in page
    assert report["cache"]["identity"] in page


def test_a_single_student(tiny_run: Path, stage: Stage, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "student-7")
    result = stage("report", ["--run_dir", run]).ok()
    assert "The distilled student is" in result.out
    report = _report(run)
    assert [row["kind"] for row in report["rows"]] == ["before", "distilled", "teacher"]
    assert report["sweep"] is None
    assert report["speeds"][0]["steps"] == 12
    assert report["commands"][1]["command"] == f"python -m stages.report --run_dir {run}"


def test_a_folder_without_a_run(stage: Stage, tmp_path: Path, sweep: Path) -> None:
    message = stage("report", ["--run_dir", tmp_path / "none"]).refused(2)
    assert "holds no finished run; expected the folder of `make distill`" in message
    ledger = json.loads((sweep / "sweep.json").read_text())
    for entry in ledger["entries"]:
        entry["state"] = "waiting"
    (sweep / "sweep.json").write_text(json.dumps(ledger))
    message = stage("report", ["--run_dir", sweep]).refused(2)
    assert "no run of this sweep is finished; expected at least one; run it first: make" in message
