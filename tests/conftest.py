"""What the tests of both stages share: a tiny teacher, its corpus, one cache, one trained run.

The expensive ones are made once a session; tests read them and never write into them.
"""

from __future__ import annotations

import hashlib
import os

# One thread: the order of a sum, and with it the last bit, then does not depend on the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as stages/__init__.py, for engines in tests
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.stage_runner import Result, Running, run_stage, start_stage
from tests.tiny import make_teacher, make_tokenizer, write_corpus

# The slow files by their length. Two processes share the files; were a long one last, the other
# process would wait for it: a quarter of the whole time.
_LONGEST_FIRST = (
    "test_submit_checks.py", "test_preparation.py", "test_teacher_fleet.py",
    "test_readme_commands.py", "test_training_engines.py", "test_resume_world.py",
    "test_vllm_agreement.py", "test_sweep_tiny.py", "test_simulated_cluster.py",
    "test_distill_tiny.py", "test_teacher_quarantine.py", "test_vllm_writes.py",
    "test_teacher_writes.py", "test_lora_student.py", "test_sampled_schemes.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within a file stays."""
    rank = {name: number for number, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@dataclass(frozen=True, slots=True)
class Tiny:
    """Where the session's tiny things lie, and the flags that name them."""

    teacher: Path
    corpus: Path

    @property
    def stage_one(self) -> list[str]:
        """Flags of stage one, without the cache's folder."""
        return [
            "--teacher_model", str(self.teacher), "--teacher.engine", "transformers",
            "--teacher.batch_tokens", "256", "--dataset_name", str(self.corpus),
            "--max_length", "96", "--corpus.heldout_fraction", "0.25", "--capture.top_k", "16",
            "--capture.shard_tokens", "500",
        ]  # fmt: skip

    @property
    def stage_two(self) -> list[str]:
        """Flags of stage two, without the folders."""
        return [
            "--student_model", str(self.teacher), "--student.keep_layers", "0,3",
            "--max_steps", "12", "--per_device_train_batch_size", "2",
            "--gradient_accumulation_steps", "1", "--learning_rate", "3e-3",
            "--save_steps", "4", "--temperature", "1", "--alpha", "1",
        ]  # fmt: skip


Stage = Callable[..., Result]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Return the tiny teacher and its corpus."""
    root = tmp_path_factory.mktemp("tiny")
    corpus = write_corpus(root / "corpus")
    return Tiny(make_teacher(root / "teacher", make_tokenizer(corpus)), corpus)


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Return a function that runs a stage in a forked process: `stage(name, flags, hook=...)`."""
    files = tmp_path_factory.mktemp("logs")
    return lambda name, argv, **options: run_stage(name, argv, files=files, **options)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Running]:
    """Return a function that starts a stage and returns at once."""
    files = tmp_path_factory.mktemp("logs")
    return lambda name, argv, **options: start_stage(name, argv, files=files, **options)


@pytest.fixture(scope="session")
def tiny_cache(tiny: Tiny, stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a complete cache of the tiny teacher."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    stage("cache_teacher", [*tiny.stage_one, "--cache_dir", folder]).ok()
    return folder


@pytest.fixture(scope="session")
def tiny_run(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the output folder of a finished run of stage two, never disturbed."""
    folder = tmp_path_factory.mktemp("run") / "student"
    flags = [*tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", folder]
    stage("train_student", flags).ok()
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every finished file below `folder`, by relative name."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.endswith(".partial")
    }
