"""Students of several caches: exact resume, any number of ranks, scores by cache; mean teachers."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline.observe.metrics import read_metrics
from pipeline.sweeps.ledger import read_inventory
from tests.conftest import Stage, Tiny
from tests.ranks import run_ranks
from tests.stage_runner import Running, real_stage
from tests.tiny import make_teacher, make_tokenizer

TAUS = ("--capture.scheme", "threshold", "--capture.tau", "0.08,0.04")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def second(tiny: Tiny, stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sampled cache of another teacher over the same samples."""
    root = tmp_path_factory.mktemp("second")
    teacher = make_teacher(root / "teacher", make_tokenizer(tiny.corpus), seed=1)
    flags = [*tiny.stage_one, "--cache_dir", root / "second", *TAUS, "--teacher_model", teacher]
    stage("cache_teacher", flags).ok()
    return root / "second"


def listed(first: Path, second: Path) -> str:
    return json.dumps(
        [
            {"url": str(first), "weight": 0.75, "tag": "first"},
            {"url": str(second), "weight": 0.25, "tag": "second"},
        ]
    )


def losses(folder: Path) -> dict[int, float]:
    records = read_metrics(folder / "metrics.jsonl")
    return {r.step: r.values["train/loss"] for r in records if "train/loss" in r.values}


def test_a_mixture(
    tiny: Tiny,
    tiny_cache: Path,
    second: Path,
    stage: Stage,
    start: Callable[..., Running],
    tmp_path: Path,
) -> None:
    flags = [
        *tiny.stage_two, "--cache_dir", listed(tiny_cache, second), "--logging_steps", "1",
        "--per_device_train_batch_size", "4",
    ]  # fmt: skip
    killed = [*flags, "--output_dir", tmp_path / "killed"]
    assert stage("train_student", killed, hook=("signal_at_step", 7, signal.SIGKILL)).code
    stage("train_student", killed).ok()
    plan = stage("train_student", [*killed, "--dry-run"]).ok().out
    assert "mixture      each cache is gone through so often: first 1." in plan
    halved = [*flags, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", "2"]
    for result in run_ranks(start, 2, halved):
        result.ok()
    stage("train_student", [*flags, "--output_dir", tmp_path / "whole"]).ok()
    whole, two = losses(tmp_path / "whole"), losses(tmp_path / "two")
    assert losses(tmp_path / "killed") == whole
    assert [*two] == [*whole]
    assert two == pytest.approx(whole, rel=1e-4)
    records = list(read_metrics(tmp_path / "whole/metrics.jsonl"))
    last = records[-1].values
    # A lower bound where a top-k is among the caches; each cache's own beside it.
    first, other = (last[f"heldout/kl/{tag}"] for tag in ("first", "second"))
    low, high = sorted((first, other))
    assert low < last["heldout/kl"] < high
    assert all(0 < last[f"heldout/acceptance{tag}"] < 1 for tag in ("", "/first", "/second"))
    logged = [r.values for r in records if "train/loss" in r.values]
    assert all("train/kl_bucketed/first" in values for values in logged)
    assert logged[-1]["train/epoch/first"] > logged[-1]["train/epoch/second"] > 0
    stage("report", ["--run_dir", tmp_path / "whole"]).ok()
    report = json.loads((tmp_path / "whole/report/report.json").read_text())
    (note,) = [note for note in report["notes"] if "each cache" in note]
    assert "first " in note
    assert "; second " in note
    # Another weight is another run, which does not go on from this one's checkpoint.
    changed = [*flags, "--output_dir", tmp_path / "whole", "--cache_dir"]
    message = stage(
        "train_student", [*changed, listed(tiny_cache, second).replace("0.75", "0.5")]
    ).refused(3)
    assert "another run (cache: " in message


def test_the_mean_of_two_teachers_of_the_same_rows(
    tiny: Tiny, tiny_cache: Path, second: Path, stage: Stage, tmp_path: Path
) -> None:
    flags = [
        *tiny.stage_two, "--cache_dir", listed(tiny_cache, second), "--data.teachers", "mean",
        "--max_steps", "3", "--output_dir", tmp_path / "mean",
    ]  # fmt: skip
    message = stage("train_student", [*flags, "--loss.divergence", "reverse_kl"]).refused(2)
    assert "data.teachers: found mean with loss.divergence reverse_kl" in message
    stage("train_student", flags).ok()
    values = list(read_metrics(tmp_path / "mean/metrics.jsonl"))[1].values
    mean = 0.75 * values["train/kl_bucketed/first"] + 0.25 * values["train/kl_bucketed/second"]
    assert values["train/kl_bucketed"] == pytest.approx(mean, rel=1e-6)
    assert values["train/loss"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.timeout(600)
def test_a_sweep_over_the_weights_of_a_mixture(
    tiny: Tiny, tiny_cache: Path, second: Path, stage: Stage, tmp_path: Path
) -> None:
    flags = iter(tiny.stage_two)
    base = {name.removeprefix("--"): yaml.safe_load(next(flags)) for name in flags}
    base |= {"student.keep_layers": [0, 3], "max_steps": 3}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    mixtures = [json.loads(listed(tiny_cache, second))]
    mixtures.append([{**share, "weight": 1} for share in mixtures[0]])
    content = {"base": str(tmp_path / "base.yaml"), "grid": {"cache_dir": mixtures}}
    file = tmp_path / "weights.yaml"
    command = ["--sweep", file, "--sweep_dir", tmp_path / "out"]

    file.write_text(yaml.safe_dump({**content, "teacher_config": "stages/configs/teacher.yaml"}))
    message = stage("sweep", command).refused(2)
    assert "teacher_config: found stages/configs/teacher.yaml with a mixture of caches" in message
    other = [mixtures[0], mixtures[0][:1], str(tiny_cache)]
    file.write_text(yaml.safe_dump({**content, "grid": {"cache_dir": other}}))
    message = stage("sweep", command).refused(2)
    assert "cache_dir 0.75 first: found other caches than in cache_dir 0.75 first 0.25" in message
    assert f"cache_dir {tiny_cache}: found other caches than in" in message
    assert not (tmp_path / "out").exists()

    file.write_text(yaml.safe_dump(content))
    real_stage("sweep", command, timeout=400).ok()
    ledger = read_inventory(tmp_path / "out")
    assert [entry.label for entry in ledger.entries] == [
        "cache_dir 0.75 first 0.25 second", "cache_dir 1 first 1 second",
    ]  # fmt: skip
    report = json.loads((tmp_path / "out/report/report.json").read_text())
    assert sorted(point["rank"] for point in report["sweep"]["points"]) == [1, 2]
    assert all(
        f"heldout/kl/{tag}" in (tmp_path / "out/runs" / entry.name / "metrics.jsonl").read_text()
        for entry in ledger.entries
        for tag in ("first", "second")
    )
    # A mixture that all points share is the sweep's, as a cache is.
    file.write_text(
        yaml.safe_dump(
            {"base": str(tmp_path / "base.yaml"), "cache_dir": mixtures[1], "grid": {"seed": [42]}}
        )
    )
    planned = stage("sweep", [*command, "--dry-run"]).ok().out
    assert "to be run 1 of 1" in planned
