"""Before GPUs are asked for: the cache's check and the corpus's preparation, their pods run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.layout.fold import reopen
from pipeline.storage import Store
from tests.cluster.api_stub import ApiStub
from tests.cluster.job_ends import Kubelet, ends, never_ends, one_error
from tests.conftest import Tiny, digests

Object = dict[str, Any]
STUDENT = ["train-student", "--overlay", "local-kind", "--poll_s", "1"]


@pytest.fixture
def volume(tiny: Tiny, tiny_cache: Path, tmp_path: Path) -> Path:
    """A volume with a complete cache of run `exp1` and the student's model."""
    root = tmp_path / "volume"
    shutil.copytree(tiny_cache, root / "distill/runs/exp1/cache")
    shutil.copytree(tiny.teacher, root / "distill/models/tiny")
    return root


MODEL = [
    "--", "--student_model", "/fsx/models/tiny", "--student.reconstruct", "none",
    "--student.keep_layers", "0,3", "--temperature", "1",
]  # fmt: skip


@pytest.mark.slow
def test_stage_two_starts_on_a_complete_cache(
    api: ApiStub, call: Any, volume: Path, tmp_path: Path
) -> None:
    kubelet = Kubelet(volume, tmp_path / "node")
    api.scripts |= {"Job": kubelet, "PyTorchJob": ends("Succeeded")}
    code, out, err = call(*STUDENT, "--run", "exp1", *MODEL)
    assert (code, err) == (0, "")
    assert "complete, " in out
    kinds = [name.split("/")[0] for name in api.created]
    assert kinds.index("Job") < kinds.index("PyTorchJob")
    assert "--world_size=2" in kubelet.commands[0]


def test_stage_two_stops_on_an_incomplete_cache(
    api: ApiStub, call: Any, volume: Path, tmp_path: Path
) -> None:
    cache = volume / "distill/runs/exp1/cache"
    reopen(Store(str(cache)), [("train", 1)])
    before = digests(volume)
    api.scripts["Job"] = Kubelet(volume, tmp_path / "node")
    code, _, err = call(*STUDENT, "--run", "exp1", *MODEL)
    assert code == 3
    message = one_error(err)
    assert "the cache is incomplete (1 of" in message
    assert "shards missing: train-00001" in message
    assert "is not submitted" in message
    assert not [name for name in api.created if name.startswith("PyTorchJob/")]
    assert digests(volume) == before


def test_each_call_checks_the_cache_again(api: ApiStub, call: Any) -> None:
    """A check of an earlier call says nothing of a cache that has changed since."""
    answers = iter(
        [
            ("Complete", "cache /fsx/cache: complete, 3 shards, identity 0123456789ab\n"),
            ("Failed", "error: /fsx/cache: the cache is incomplete.\n"),
        ]
    )

    def check(stub: ApiStub, job: Object) -> None:
        kind, log = next(answers)
        stub.add_pod(job, log=log, phase="Succeeded" if kind == "Complete" else "Failed")
        stub.end_job(job, kind, completed=kind == "Complete")

    api.scripts |= {"Job": check, "PyTorchJob": ends("Failed")}
    code, out, _ = call(*STUDENT, "--run", "exp1", *MODEL)
    assert (code, "complete, 3 shards" in out) == (1, True)  # and the training fails
    code, _, err = call(*STUDENT, "--run", "exp1", *MODEL)
    assert code == 3
    assert "the cache is incomplete" in one_error(err)
    assert sum(name.startswith("Job/") for name in api.created) == 2


def test_stage_two_stops_on_another_identity(
    api: ApiStub, call: Any, volume: Path, tmp_path: Path
) -> None:
    api.scripts["Job"] = Kubelet(volume, tmp_path / "node")
    code, _, err = call(*STUDENT, "--run", "exp1", "--cache_identity", "0123456789ab", *MODEL)
    assert code == 3
    message = one_error(err)
    assert "a cache of identity" in message
    assert "expected 0123456789ab" in message
    assert not [name for name in api.created if name.startswith("PyTorchJob/")]


PREPARE = ["prepare-corpus", "--overlay", "local-kind", "--poll_s", "1", "--run", "exp2"]
CORPUS = [
    "--", "--teacher_model", "/fsx/models/tiny", "--teacher.engine", "transformers",
    "--dataset_name", "/fsx/chats/chats.jsonl", "--num_samples", "none", "--max_length", "96",
]  # fmt: skip


@pytest.mark.slow
def test_the_corpus_is_prepared_by_all_workers(
    api: ApiStub, call: Any, tiny: Tiny, tmp_path: Path
) -> None:
    root = tmp_path / "volume"
    shutil.copytree(tiny.teacher, root / "distill/models/tiny")
    shutil.copytree(tiny.corpus.parent, root / "distill/chats")
    kubelet = Kubelet(root, tmp_path / "node")
    api.scripts["Job"] = kubelet
    code, _, err = call(*PREPARE, "--workers", "2", *CORPUS)
    assert (code, err) == (0, "")
    (name,) = (item.removeprefix("Job/") for item in api.created if item.startswith("Job/"))
    assert len(kubelet.commands) == 2
    assert not [item for item in api.created if item.startswith("PyTorchJob/")]
    said = [line for line in api.logs[f"{name}-abcde"].splitlines() if line.startswith("corpus ")]
    assert len(said) == 2
    folders = list((root / "distill/runs/exp2/cache/_meta/corpus").iterdir())
    assert len(folders) == 1
    # It has succeeded: nothing is done again.
    made = list(api.created)
    assert "has succeeded already" in call(*PREPARE, "--workers", "2", *CORPUS)[1]
    assert api.created == made
    assert f"{name:<50} exp2" in call("jobs", "--overlay", "local-kind")[1]


@pytest.mark.slow
def test_a_preparation_that_fails_is_begun_again(api: ApiStub, call: Any) -> None:
    api.scripts["Job"] = ends("Failed", reason="PodFailurePolicy", completed=False)
    code, _, err = call(*PREPARE)
    assert code == 1
    assert "failed (PodFailurePolicy" in one_error(err)
    api.scripts["Job"] = never_ends
    code, out, _ = call(*PREPARE, "--timeout_s", "2")
    assert code == 124
    assert "failed before (PodFailurePolicy" in out
    # It runs: the command attaches, and reads the logs of one of its pods.
    made = list(api.created)
    code, out, _ = call(*PREPARE, "--timeout_s", "3")
    assert code == 124
    assert "following it" in out
    assert "waiting" in out
    assert api.created == made
    assert "waiting" in call("logs", "--overlay", "local-kind", "--run", "exp2")[1]


def test_nothing_is_submitted_of_a_corpus_off_the_volume(api: ApiStub, call: Any) -> None:
    code, _, err = call(*PREPARE, "--", "--corpus.prepared", "s3://bucket/corpus")
    assert code == 2
    assert "corpus.prepared: found s3://bucket/corpus" in one_error(err)
    assert api.created == []
