"""The whole path on the tiny teacher: two stages, a control, a table and a page that agree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import ConfigError
from pipeline.evaluate.measures import HeldoutScores
from pipeline.observe.metrics import read_metrics
from stages.distill import main
from tests.conftest import Tiny, digests
from tests.stage_runner import ENVIRONMENT, ROOT, Result, real_stage

pytestmark = pytest.mark.slow

ROWS = ("student before", "distilled student", "cross-entropy control", "dense student")


@pytest.fixture(scope="module")
def flags(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return the flags of a run whose settings stand in files, as the default's do."""
    root = tmp_path_factory.mktemp("distill")
    teacher = {
        "teacher": {"model": str(tiny.teacher), "engine": "transformers", "batch_tokens": 256},
        "corpus": {"dataset_name": str(tiny.corpus), "max_length": 96, "heldout_fraction": 0.25},
        "capture": {"top_k": 16, "shard_tokens": 500},
    }
    student = {
        "student": {
            "model": str(tiny.teacher), "keep_layers": [0, 2], "reconstruct": "least_squares",
            "reconstruct_tokens": 1000, "freeze": ["embed_tokens"],
        },
        "loss": {"temperature": 1.0, "alpha": 1.0},
        "data": {"max_entries": 8},
        "train": {
            "max_steps": 20, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
            "learning_rate": 0.003, "save_steps": 10, "eval_steps": 10,
        },
    }  # fmt: skip
    for name, content in (("teacher", teacher), ("student", student)):
        (root / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return [
        "--run_dir", root / "run", "--teacher_config", root / "teacher.yaml",
        "--student_config", root / "student.yaml", "--dense", "true",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(flags: list[Any]) -> Result:
    return real_stage("distill", flags, timeout=290).ok()


@pytest.fixture(scope="module")
def run_dir(flags: list[Any], done: Result) -> Path:
    return Path(flags[1])


def test_it_ends_with_the_table_and_where_everything_lies(done: Result, run_dir: Path) -> None:
    titles = re.findall(r"^== (\d)/5 ", done.out, re.MULTILINE)
    assert titles == ["1", "2", "3", "4", "5"]
    for row in (*ROWS, "teacher"):
        assert re.search(rf"{row}\b.*\d\.\d", done.out), f"no row {row!r} in\n{done.out}"
    for path in ("report", "student/model", "cache"):
        assert str(run_dir / path) in done.out
    assert "the same command again redoes nothing" in done.out
    assert "next" in done.out


def test_the_numbers_are_those_of_the_runs(run_dir: Path) -> None:
    (file,) = (run_dir / "report").glob("*.json")
    report = json.loads(file.read_text())
    rows = {row["name"]: row["metrics"] for row in report["rows"]}
    for name, folder, when in (
        ("student before", "student", "before"),
        ("distilled student", "student", "after"),
        ("cross-entropy control", "control", "after"),
        ("dense student", "dense", "after"),
    ):
        scores = HeldoutScores.read(str(run_dir / folder / f"heldout-{when}.json"))
        for metric in ("kl", "cross_entropy", "top1_agreement"):
            mean = scores.mean(metric)
            assert rows[name][metric]["value"] == pytest.approx(mean.value, rel=1e-9)
    kl = {name: metrics["kl"]["value"] for name, metrics in rows.items()}
    assert kl["teacher"] == 0
    assert kl["distilled student"] < kl["cross-entropy control"]
    # The control learns what it is meant to learn.
    control = list(read_metrics(run_dir / "control/metrics.jsonl"))
    assert "heldout/kl" not in control[0].values
    losses = [r.values["train/loss"] for r in control if "train/loss" in r.values]
    assert losses == [r.values["train/cross_entropy"] for r in control if "train/loss" in r.values]


def test_held_out_curves_are_over_tokens_from_one_start(run_dir: Path) -> None:
    report = json.loads((run_dir / "report/report.json").read_text())
    for name in ("held-out KL", "held-out cross-entropy"):
        curves = {curve["series"]: curve for curve in report["curves"] if curve["name"] == name}
        assert tuple(curves) == ROWS[1:]
        assert {curve["over"] for curve in curves.values()} == {"tokens"}
        points = [curve["points"] for curve in curves.values()]
        assert [len(each) for each in points] == [3, 3, 3]
        assert len({tuple(tokens for tokens, _ in each) for each in points}) == 1
        assert len({each[0][1] for each in points}) == 1, "the student before training"
        assert len({each[-1][1] for each in points}) == 3
    detail = next(row["detail"] for row in report["rows"] if row["name"] == "dense student")
    assert detail == "same start, data and steps; learned from all 16 cached entries of a target"


def test_the_control_starts_from_the_same_weights_and_batches(run_dir: Path) -> None:
    first = next(r for r in read_metrics(run_dir / "student/metrics.jsonl") if r.step == 1)
    other = next(r for r in read_metrics(run_dir / "control/metrics.jsonl") if r.step == 1)
    assert first.values["train/cross_entropy"] == pytest.approx(
        other.values["train/cross_entropy"], rel=1e-6
    )
    assert first.values["train/tokens"] == other.values["train/tokens"]


def test_the_page_holds_the_numbers_of_its_json(run_dir: Path) -> None:
    (page,) = (run_dir / "report").glob("*.html")
    text = page.read_text()
    (file,) = (run_dir / "report").glob("*.json")
    for row in json.loads(file.read_text())["rows"]:
        assert row["name"] in text
        for metric in ("kl", "cross_entropy"):
            value = row["metrics"][metric]["value"]
            shown = {f"{value:.{digits}f}" for digits in (2, 3, 4)} | {f"{value:.3g}"}
            assert any(number in text for number in shown), (row["name"], metric, value)
    assert "http://" not in re.sub(r"http://www\.w3\.org\S*", "", text)
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"https?:", text), "works offline"
    manifest = json.loads((run_dir / "cache/_meta/manifest.json").read_text())
    assert manifest["identity_digest"][:12] in text


def test_the_same_command_again_redoes_nothing(flags: list[Any], run_dir: Path) -> None:
    before = {n: d for n, d in digests(run_dir).items() if not n.startswith("report/")}
    times = {file: file.stat().st_mtime_ns for file in run_dir.rglob("*.safetensors")}
    again = real_stage("distill", flags, timeout=290).ok()
    assert again.out.count(": done\n") == 5
    assert "distilled student" in again.out
    assert not again.err
    assert {n: d for n, d in digests(run_dir).items() if not n.startswith("report/")} == before
    assert {file: file.stat().st_mtime_ns for file in run_dir.rglob("*.safetensors")} == times


def test_a_stage_that_is_asked_again_finds_nothing_to_do(flags: list[Any], run_dir: Path) -> None:
    """Where the record of finished steps is lost, each stage finds out by itself."""
    before = {n: d for n, d in digests(run_dir).items() if not n.startswith(("report/", "steps"))}
    (run_dir / "steps.json").unlink()
    again = real_stage("distill", flags, timeout=290).ok()
    assert "is complete" in again.err
    assert again.err.count("nothing to train") == 3
    left = {n: d for n, d in digests(run_dir).items() if not n.startswith(("report/", "steps"))}
    assert left == before


def test_the_report_alone(run_dir: Path) -> None:
    (file,) = (run_dir / "report").glob("*.json")
    before = json.loads(file.read_text())["rows"]
    result = real_stage("report", ["--run_dir", run_dir]).ok()
    assert "distilled student" in result.out
    assert json.loads(file.read_text())["rows"] == before


def test_a_push_that_fails_loses_nothing(run_dir: Path, tmp_path: Path) -> None:
    before = digests(run_dir / "student/model")
    flags = ["--output_dir", run_dir / "student", "--hub_location", "nobody/student"]
    # Offline, and a hub that does not answer.
    env = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    message = real_stage("push_student", flags, env=env).refused(4)
    assert "nobody/student: the student cannot be pushed" in message
    assert f"the student is safe in {run_dir / 'student/model'}" in message
    assert "repeat with `make push-student ARGS=" in message
    assert digests(run_dir / "student/model") == before
    flags = ["--output_dir", tmp_path / "none", "--hub_location", "nobody/student"]
    message = real_stage("push_student", flags).refused(3)
    assert "no finished student; expected a run of train-student that has ended" in message


@pytest.mark.timeout(900)
def test_a_run_that_is_stopped_goes_on_to_the_same_students(
    flags: list[Any], run_dir: Path, tmp_path: Path
) -> None:
    root = tmp_path / "stopped"
    again = [*flags, "--run_dir", root]
    command = [sys.executable, "-m", "stages.distill", *map(str, again)]
    environment = {**os.environ, **ENVIRONMENT}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    ) as process:  # fmt: skip
        end = time.monotonic() + 200
        # The student is at its first steps, the control begins.
        while not (root / "student/metrics.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.02)
        process.terminate()
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "Traceback" not in said
    assert not (root / "student/finished.json").exists()
    assert "run the same command again" in said.splitlines()[-1]
    done = real_stage("distill", again, timeout=290).ok()
    assert re.search(r"^student: .*student written to", done.err + done.out, re.MULTILINE)
    for name in ("student", "control", "dense"):
        one, other = (folder / name / "model/model.safetensors" for folder in (run_dir, root))
        assert one.read_bytes() == other.read_bytes(), name


def test_a_training_that_fails_stops_the_other(
    flags: list[Any], run_dir: Path, tmp_path: Path
) -> None:
    root = tmp_path / "failing"
    shutil.copytree(run_dir / "cache", root / "cache")
    (root / "control").mkdir()
    (root / "control/model").write_text("no folder\n")
    result = real_stage("distill", [*flags, "--run_dir", root], timeout=290)
    assert result.code not in (0, 1), result.err
    assert "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("error: the training of the control ended with")
    assert re.search(r"^control: error: ", result.err, re.MULTILINE)


def test_a_dense_student_needs_another_to_be_beside(tmp_path: Path) -> None:
    file = tmp_path / "student.yaml"
    file.write_text("loss: {alpha: 0.5}\n")
    command = ["--run_dir", str(tmp_path / "x"), "--student_config", str(file), "--dense", "true"]
    with pytest.raises(ConfigError, match=r"data\.max_entries is none\); expected data"):
        main(command)
    assert not (tmp_path / "x").exists()


def test_a_stage_that_fails_ends_the_whole(flags: list[Any], tmp_path: Path) -> None:
    broken = tmp_path / "teacher.yaml"
    broken.write_text("capture:\n  top_k: 0\n")
    result = real_stage(
        "distill", [*flags, "--run_dir", tmp_path / "x", "--teacher_config", broken]
    )
    assert result.code == 2
    assert "Traceback" not in result.err
    first, second = (line for line in result.err.splitlines() if line.startswith("error: "))
    assert "capture.top_k: found 0" in first
    assert "stages.cache_teacher ended with exit code 2" in second
    assert not (tmp_path / "x").exists()
