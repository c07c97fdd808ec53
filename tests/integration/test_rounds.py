"""Rounds on the tiny teacher: what comes of them, killed anywhere, and what they refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pipeline.cache.io.reader import open_cache
from pipeline.errors import ConfigError
from stages import parts
from stages.parts import StageFailed
from stages.round_commands import Weights
from stages.rounds import main
from tests.conftest import Stage, Tiny, digests
from tests.stage_runner import Running

pytestmark = pytest.mark.slow

START = Callable[..., Running]
PARTS = (
    "corpus", "round-00/student", "round-00/own-text", "round-00/scores", "round-01/cache",
    "round-01/student", "round-01/own-text", "round-01/scores", "report",
)  # fmt: skip


@pytest.fixture(scope="module")
def flags(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the flags of rounds without their folder."""
    root = tmp_path_factory.mktemp("rounds")
    files = {
        "teacher": {
            "teacher": {"model": str(tiny.teacher), "engine": "transformers", "batch_tokens": 256},
            "corpus": {
                "dataset_name": str(tiny.corpus), "max_length": 96, "heldout_fraction": 0.3,
                "num_samples": 24, "overlong": "truncate",
            },
            "generate": {"max_new_tokens": 12, "shard_prompts": 8},
            "capture": {"top_k": 16, "shard_tokens": 500},
        },
        "student": {
            "student": {"model": str(tiny.teacher), "keep_layers": [0, 2]},
            "train": {
                "max_steps": 4, "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 1, "learning_rate": 0.003, "save_steps": 2,
            },
        },
    }  # fmt: skip
    for name, content in files.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return [
        "--rounds", "1", "--corpus_weight", "0.5",
        "--teacher_config", str(root / "teacher.yaml"),
        "--student_config", str(root / "student.yaml"),
    ]  # fmt: skip


class Runner:
    """Runs the stages in forked processes, in place of `subprocess.run`; kills one if told to."""

    def __init__(self, start: START) -> None:
        self._start = start
        self.started: list[str] = []
        self.kill_at: tuple[int, float] | None = None
        """Number of the part, and seconds."""

    def __call__(self, command: Sequence[str], *, check: bool) -> Any:
        assert command[1] == "-m"
        name = command[2].removeprefix("stages.")
        self.started.append(name)
        running = self._start(name, command[3:])
        if self.kill_at is not None and len(self.started) == self.kill_at[0]:
            time.sleep(self.kill_at[1])
            running.process.kill()
            running.process.join()
            return subprocess.CompletedProcess(command, -9)
        done = running.wait(240)
        print(done.out)
        if done.code:
            print(done.err)
        return subprocess.CompletedProcess(command, done.code)


@pytest.fixture
def runner(start: START, monkeypatch: pytest.MonkeyPatch) -> Runner:
    found = Runner(start)
    monkeypatch.setattr(parts, "subprocess", SimpleNamespace(run=found))
    return found


@pytest.fixture(scope="module")
def finished(flags: list[str], start: START, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "rounds"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "subprocess", SimpleNamespace(run=Runner(start)))
        assert main(["--run_dir", str(folder), *flags]) == 0
    return folder


def _kept(folder: Path) -> dict[str, str]:
    """Return what two runs must agree on: logs have times in them."""
    return {
        name: digest
        for name, digest in digests(folder).items()
        if name.endswith((".parquet", ".safetensors", "manifest.json", "scores.json"))
    }


def test_a_round_reads_what_the_student_before_it_wrote(finished: Path) -> None:
    cache = open_cache(str(finished / "round-01/cache"))
    generate = cache.manifest.identity["corpus"]["generate"]
    assert generate["writer"]["model"] == str(finished / "round-00/student/model")
    own = open_cache(str(finished / "round-01/own-text"))
    assert not own.manifest.of_split("train")
    held = {row.sample_id for row in cache.source("heldout").read_rows(0, range(2))}
    assert held <= {row.sample_id for row in _rows(own)}
    started = json.loads((finished / "steps.json").read_text())
    assert list(started)[-1] == "report"


def _rows(cache: Any) -> list[Any]:
    source = cache.source("heldout")
    return [
        row
        for shard, rows in enumerate(source.shard_rows())
        for row in source.read_rows(shard, range(rows))
    ]


def test_a_round_learns_from_the_corpus_as_well(finished: Path) -> None:
    config = yaml.safe_load((finished / "round-01/student/config.yaml").read_text())
    assert [(one["tag"], one["weight"]) for one in config["cache_dir"]] == [
        ("round-01", 1.0),
        ("corpus", 0.5),
    ]
    records = (finished / "round-01/student/metrics.jsonl").read_text()
    assert "heldout/kl/corpus" in records
    assert "heldout/kl/round-01" in records


def test_the_report_has_a_row_a_round(finished: Path) -> None:
    report = json.loads((finished / "report/report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["round-00", "round-01"]
    for number, row in enumerate(report["rows"]):
        scores = json.loads((finished / f"round-0{number}/scores/scores.json").read_text())
        own = scores["caches"]["own"]["scores"]
        mean = sum(own["sums"]["kl"]) / sum(own["loss_tokens"])
        assert row["metrics"]["own_kl"]["value"] == pytest.approx(mean)
        assert "kl" in row["metrics"]
    page = (finished / "report/report.html").read_text()
    assert "KL on its own text" in page
    assert "round-01" in page


def test_the_same_command_again_redoes_nothing(
    finished: Path, flags: list[str], runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(finished)
    assert main(["--run_dir", str(finished), *flags]) == 0
    assert runner.started == []
    assert "round-01" in capsys.readouterr().out
    assert digests(finished) == before


@pytest.mark.parametrize("first", [2, 5, 6, 7])
def test_killed_in_any_part_it_goes_on_to_the_same_bytes(
    first: int, finished: Path, flags: list[str], runner: Runner
) -> None:
    """All parts from `first` on are made again, the first of them killed on its way."""
    before = _kept(finished)
    for name in PARTS[first - 1 :]:
        shutil.rmtree(finished / name)
    command = ["--run_dir", str(finished), *flags]
    runner.kill_at = (1, 0.3 + 0.3 * (first % 3))
    with pytest.raises(StageFailed):
        main(command)
    runner.kill_at = None
    runner.started.clear()
    assert main(command) == 0
    assert len(runner.started) == len(PARTS) - first
    assert _kept(finished) == before


def test_what_is_refused_before_any_part(flags: list[str], runner: Runner, tmp_path: Path) -> None:
    teacher, student = tmp_path / "t.yaml", tmp_path / "s.yaml"
    teacher.write_text("generate: {writer: somebody}\ncorpus: {heldout_fraction: 0}\n")
    student.write_text("loss: {cross_tokenizer: uld, temperature: 1}\n")
    with pytest.raises(ConfigError) as caught:
        main([
            "--run_dir", str(tmp_path / "x"), *flags, "--teacher_config", str(teacher),
            "--student_config", str(student),
        ])  # fmt: skip
    message = str(caught.value)
    assert "generate.writer: found somebody" in message
    assert "corpus.heldout_fraction: found 0" in message
    assert "loss.cross_tokenizer: found uld" in message
    assert runner.started == []
    assert not (tmp_path / "x").exists()


def test_text_of_earlier_rounds_counts_by_its_age() -> None:
    weights = Weights(corpus=0.0, earlier=0.5)
    assert weights.of_round(1) == {"round-01": 1.0}
    assert weights.of_round(3) == {"round-03": 1.0, "round-02": 0.5, "round-01": 0.25}
    assert Weights(corpus=2.0, earlier=0.0).of_round(2) == {"round-02": 1.0, "corpus": 2.0}


def test_it_stops_where_nothing_is_gained(
    finished: Path, flags: list[str], runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--run_dir", str(finished), *flags, "--rounds", "3", "--least_gain", "1000"]
    assert main(command) == 0
    assert runner.started == []
    assert "less than 1000" in capsys.readouterr().out


def test_a_writer_with_another_vocabulary(
    tiny: Tiny, stage: Stage, tmp_path: Path, embedded_folder: Path
) -> None:
    flags = [
        *tiny.stage_one, "--cache_dir", tmp_path / "cache", "--generate.enabled", "true",
        "--generate.max_new_tokens", "8", "--generate.writer", embedded_folder,
    ]  # fmt: skip
    message = stage("cache_teacher", flags).refused(3)
    assert "its vocabulary is not the teacher's" in message
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def embedded_folder() -> Path:
    from pipeline.models.embedded import embedded_model

    return embedded_model().path
