"""A cluster simulated locally: the expanded pods of overlay `local-kind`, run as processes.

`make simulate-cluster`, and `make test-all`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from k8s.rendering.render import RenderedJob, render_job
from pipeline.cache.io.reader import open_cache
from pipeline.cache.layout.names import PLAN
from pipeline.observe.metrics import read_metrics
from tests.cluster.job_process import JobProcess
from tests.cluster.pod_process import Isolation, Node, best_isolation
from tests.conftest import digests
from tests.tiny import make_teacher, make_tokenizer, write_corpus

TEACHER = [
    "--teacher_model", "/fsx/models/tiny", "--teacher.engine", "transformers",
    "--teacher.batch_tokens", "256", "--dataset_name", "/fsx/chats/chats.jsonl",
    "--num_samples", "none", "--max_length", "96", "--corpus.heldout_fraction", "0.25",
    "--capture.top_k", "16", "--capture.shard_tokens", "200", "--capture.lease_s", "2",
]  # fmt: skip
STUDENT = [
    "--student_model", "/fsx/models/tiny", "--student.keep_layers", "0,3",
    "--student.reconstruct", "none", "--max_steps", "12", "--per_device_train_batch_size", "1",
    "--gradient_accumulation_steps", "1", "--learning_rate", "3e-3", "--data.pack_length", "96",
    "--train.save_steps", "4", "--temperature", "1", "--alpha", "1", "--train.timeout_s", "60",
]  # fmt: skip


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What prefetch would have left on the volume: a tiny teacher and its chats."""
    root = tmp_path_factory.mktemp("volume")
    corpus = write_corpus(root / "distill/chats")
    make_teacher(root / "distill/models/tiny", make_tokenizer(corpus))
    return root


def _node(tmp_path: Path, volume: Path, isolation: Isolation) -> Node:
    return Node(tmp_path / "node", volume, isolation)


def _render(stage: Any, flags: list[str], *, run: str, nodes: int) -> RenderedJob:
    return render_job(stage=stage, run=run, overlay="local-kind", flags=flags, nodes=nodes)


def _on_host(volume: Path, path: str) -> Path:
    return volume / "distill" / path.removeprefix("/fsx/")


def _kill_first_lease_holder(cache: Path) -> Any:
    """Return a disturbance: SIGKILL for the pod whose lease is seen first."""

    def disturb(job: JobProcess) -> bool:
        for file in (cache / "_meta/leases").glob("*.json"):
            try:
                lease = json.loads(file.read_text())
                worker, pid = str(lease["worker"]), int(lease["pid"])
            except (OSError, ValueError, KeyError):
                continue
            for pod in job.pods:
                # By hostname; over the loopback all pods have this machine's.
                here = job.node.isolation is Isolation.LOOPBACK and pid == pod.pid
                if here or pod.name in worker:
                    pod.kill()
                    return True
        return False

    return disturb


def _kill_after_checkpoint(student: Path, step: int, index: int) -> Any:
    """Return a disturbance: SIGKILL for one worker once a checkpoint is complete."""

    def disturb(job: JobProcess) -> bool:
        if not (student / f"checkpoints/step-{step:08d}/complete.json").exists():
            return False
        job.pods[index].kill()
        return True

    return disturb


def _every_shard_once(cache: Path) -> None:
    planned = json.loads((cache / PLAN).read_text())["shards"]
    opened = open_cache(str(cache))
    assert opened.manifest.shard_counts == planned
    identities: list[str] = []
    for split in ("train", "heldout"):
        source = opened.source(split)
        for shard, rows in enumerate(source.shard_rows()):  # decoding compares the checksums
            identities += [row.sample_id for row in source.read_rows(shard, range(rows))]
    assert len(identities) == len(set(identities)) == 56
    files = sorted(file.stem for file in (cache / "data").rglob("*"))
    assert len([name for name in files if name.isdigit()]) == sum(planned.values())
    assert not list((cache / "_meta/leases").glob("*"))


def _losses(student: Path) -> list[tuple[int, dict[str, float]]]:
    records = [record.without_timing() for record in read_metrics(student / "metrics.jsonl")]
    return [(record.step, record.values) for record in records]


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_two_pods_per_stage_one_of_them_killed(volume: Path, tmp_path: Path) -> None:
    isolation = best_isolation()
    if os.environ.get("SIMULATE_CLUSTER") == "loopback":
        isolation = Isolation.LOOPBACK
    print(f"\nsimulation: pods are kept apart by {isolation.value}")
    teacher = _render("cache-teacher", TEACHER, run="two", nodes=2)
    cache = volume / "distill/runs/two/cache"
    with _node(tmp_path, volume, isolation) as node:
        job = JobProcess(node, teacher, "hyperpod-2023")
        job.run(disturb=_kill_first_lease_holder(cache), timeout_s=900)
        assert sum(pod.restarts for pod in job.pods) >= 1
        _every_shard_once(cache)
        print("simulation: stage one, 2 workers, one killed at its first shard: every shard once")

        folders = {name: volume / f"distill/runs/{name}/student" for name in ("calm", "killed")}
        flags = [*STUDENT, "--cache_dir", "/fsx/runs/two/cache"]
        calm = JobProcess(node, _render("train-student", flags, run="calm", nodes=2), "v1.9.4")
        calm.run(timeout_s=900)
        assert not sum(pod.restarts for pod in calm.pods)
        print("simulation: stage two, 2 workers, one process group")
        rendered = _render("train-student", flags, run="killed", nodes=2)
        killed = JobProcess(node, rendered, "hyperpod-2023")
        killed.run(disturb=_kill_after_checkpoint(folders["killed"], 4, 1), timeout_s=900)
        assert "resuming after step" in killed.log
        print(
            "simulation: the same, worker-1 killed; restarts:",
            [pod.restarts for pod in killed.pods],
        )
    steps = [step for step, values in _losses(folders["calm"]) if "train/loss" in values]
    assert steps == list(range(1, 13))
    assert _losses(folders["killed"]) == _losses(folders["calm"])
    weights = [digests(folder)["model/model.safetensors"] for folder in folders.values()]
    assert weights[0] == weights[1]
    # One training of two processes, not two trainings: a checkpoint names its world size.
    mark = folders["calm"] / "checkpoints/step-00000012/complete.json"
    assert json.loads(mark.read_text())["world_size"] == 2
    print("simulation: losses and weights equal the undisturbed run's, bit for bit")
