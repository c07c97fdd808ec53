"""A run without held-out evaluation: refused where it would evaluate, else trained to its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.observe.metrics import read_metrics
from tests.conftest import Stage, Tiny

NEVER = ("--train.evaluate_before", "false", "--train.evaluate", "never")


@pytest.fixture(scope="module")
def flags(tiny: Tiny, stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return the flags of stage two on a cache of which nothing is held out."""
    cache = tmp_path_factory.mktemp("all") / "cache"
    zero = ("--corpus.heldout_fraction", "0")
    stage("cache_teacher", [*tiny.stage_one, "--cache_dir", cache, *zero]).ok()
    return [*tiny.stage_two, "--max_steps", "4", "--cache_dir", cache]


def test_refused_where_it_would_evaluate(flags: list[Any], stage: Stage, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    for some in ((), NEVER[:2], NEVER[2:]):
        run = stage("train_student", [*flags, "--output_dir", folder, *some, "--check"])
        message = run.refused(3)
        assert "no held-out rows; expected some, for the evaluation" in message
        assert "--corpus.heldout_fraction" in message
        assert "--train.evaluate_before false --train.evaluate never" in message
    wrong = (*NEVER, "--train.eval_steps", "2")
    message = stage("train_student", [*flags, "--output_dir", folder, *wrong]).refused(2)
    assert "train.eval_steps: found 2 with train.evaluate never" in message
    assert not folder.exists()


def test_trained_to_its_end_without_a_held_out_figure(
    flags: list[Any], stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    stage("train_student", [*flags, "--output_dir", folder, *NEVER]).ok()
    assert (folder / "model/model.safetensors").exists()
    assert (folder / "finished.json").exists()
    assert not list(folder.glob("heldout-*.json"))
    logged = {name for record in read_metrics(folder / "metrics.jsonl") for name in record.values}
    assert "train/loss" in logged
    assert not any(name.startswith("heldout/") for name in logged)
    card = (folder / "model/README.md").read_text()
    assert "## Held-out measures\n\nNot measured: " in card
    assert (
        "nothing to train" in stage("train_student", [*flags, "--output_dir", folder, *NEVER]).err
    )
    result = stage("report", ["--run_dir", folder]).ok()
    assert "This report compares no two models." in result.out
    report = json.loads((folder / "report/report.json").read_text())
    assert all(not row["metrics"] for row in report["rows"])
    assert any("Not measured on held-out text" in note for note in report["notes"])
    assert "not measured" in (folder / "report/report.html").read_text()


def test_not_evaluated_though_rows_are_held_out(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "heldout-after.json").write_text("of an earlier run")
    command = [*tiny.stage_two, "--max_steps", "2", "--cache_dir", tiny_cache]
    stage("train_student", [*command, "--output_dir", folder, *NEVER]).ok()
    assert not list(folder.glob("heldout-*.json"))


@pytest.mark.slow
def test_a_sweep_that_is_decided_by_what_is_not_measured(
    flags: list[Any], stage: Stage, tmp_path: Path
) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("{}\n")
    overrides = {
        "student.model": flags[1], "student.keep_layers": [0, 3], "train.max_steps": 2,
        "train.evaluate": "never", "train.evaluate_before": False,
        "train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 1,
    }  # fmt: skip
    content = {
        "base": str(base), "cache_dir": str(flags[-1]), "overrides": overrides,
        "grid": {"loss.alpha": [0.2, 1.0]},
    }  # fmt: skip
    file = tmp_path / "sweep.yaml"
    out = ("--sweep_dir", tmp_path / "out")

    file.write_text(yaml.safe_dump(content))
    message = stage("sweep", ["--sweep", file, *out]).refused(2)
    assert "found train.evaluate never with the objective heldout/kl" in message
    assert "train/loss" in message
    assert not (tmp_path / "out").exists()
    file.write_text(yaml.safe_dump(content | {"objective": "train/loss"}))
    stage("sweep", ["--sweep", file, *out]).ok()
    report = json.loads((tmp_path / "out/report/report.json").read_text())
    assert [point["rank"] for point in report["sweep"]["points"]] == [1, 2]
