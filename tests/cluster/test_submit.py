"""The submit path against a stand-in of the API server: real kubectl, real cache checks."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from k8s.__main__ import main
from k8s.rendering.manifests import EXAMPLE_IMAGES
from pipeline.cache.layout.fold import reopen
from pipeline.errors import run_command
from pipeline.storage import Store
from tests.cluster.api_stub import ApiStub
from tests.cluster.pod_process import Isolation, Node, PodProcess
from tests.conftest import Tiny, digests

Object = dict[str, Any]
TEACHER = ["cache-teacher", "--overlay", "local-kind", "--poll_s", "1"]
STUDENT = ["train-student", "--overlay", "local-kind", "--poll_s", "1"]


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiStub]:
    monkeypatch.chdir(tmp_path)  # no record of pushed images here
    with ApiStub(tmp_path) as stub:
        for name, value in stub.environment().items():
            monkeypatch.setenv(name, value)
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "distill"}}
        stub.put(namespace)
        yield stub


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command as `python -m k8s` would; return exit code, output, errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = run_command(lambda: main(arguments))
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


def _ends(kind: str, *, reason: str = "", completed: bool = True, after_s: float = 1.0) -> Any:
    """Return what becomes of a PyTorchJob: its worker runs, prints a line, and it ends."""

    def script(api: ApiStub, job: Object) -> None:
        api.add_pod(job, log="step 1, loss=2.5\n")
        running = {"type": "Running", "status": "True"}
        api.set_status(job, {"conditions": [running]})
        time.sleep(after_s)
        api.end_job(job, kind, reason=reason, completed=completed)

    return script


def _never_ends(api: ApiStub, job: Object) -> None:
    api.add_pod(job, log="waiting\n")
    api.set_status(job, {"conditions": [{"type": "Running", "status": "True"}]})


def _one_error(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    return lines[0]


def test_success(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = _ends("Succeeded")
    code, out, err = call(*TEACHER, "--run", "exp1")
    assert (code, err) == (0, "")
    assert "succeeded" in out
    (job,) = [name for name in api.created if name.startswith("PyTorchJob/")]
    assert job.startswith("PyTorchJob/cache-teacher-exp1-")
    assert f"ConfigMap/{job.removeprefix('PyTorchJob/')}" in api.created


def test_logs_are_followed(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = _ends("Succeeded", after_s=3)
    assert "step 1, loss=2.5" in call(*TEACHER, "--run", "exp1")[1]


def test_a_failed_job_ends_the_command_at_once(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = _ends("Failed", reason="BackoffLimitExceeded")
    started = time.monotonic()
    code, _, err = call(*TEACHER, "--run", "exp1", "--timeout_s", "600", "--poll_s", "300")
    assert code == 1
    assert "failed (BackoffLimitExceeded" in _one_error(err)
    assert "step 1, loss=2.5" in err  # the last lines of its pods
    assert time.monotonic() - started < 120  # not after the poll of 300 s, nor the time-out


def test_a_failure_without_completion_time_is_seen(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = _ends("Failed", reason="PodFailed", completed=False)
    code, _, err = call(*TEACHER, "--run", "exp1", "--timeout_s", "600")
    assert code == 1
    assert "PodFailed" in _one_error(err)


def test_a_rejected_job(api: ApiStub, call: Any) -> None:
    api.reject = lambda item: (
        "Worker.replicas: quota exceeded" if item["kind"] == "PyTorchJob" else None
    )
    code, _, err = call(*TEACHER, "--run", "exp1")
    assert code == 1
    assert "quota exceeded" in _one_error(err)
    assert not [name for name in api.created if name.startswith("PyTorchJob/")]


def test_time_out_leaves_the_job(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = _never_ends
    code, _, err = call(*TEACHER, "--run", "exp1", "--timeout_s", "3")
    assert code == 124
    assert "not done after 3 s" in _one_error(err)
    assert [name for name in api.objects if name[0] == "PyTorchJob"]


def test_the_same_command_follows_and_restarts(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = _never_ends
    assert call(*TEACHER, "--run", "exp1", "--timeout_s", "2")[0] == 124
    (key,) = [key for key in api.objects if key[0] == "PyTorchJob"]
    made = list(api.created)
    # It runs: the command attaches.
    code, out, _ = call(*TEACHER, "--run", "exp1", "--timeout_s", "2")
    assert code == 124
    assert "following it" in out
    assert api.created == made
    # It has failed: the command recreates it under the same name.
    api.end_job(api.objects[key], "Failed", reason="Evicted")
    api.scripts["PyTorchJob"] = _ends("Succeeded")
    code, out, _ = call(*TEACHER, "--run", "exp1")
    assert code == 0
    assert "failed before (Evicted" in out
    # It has succeeded: nothing is done again.
    made = list(api.created)
    code, out, _ = call(*TEACHER, "--run", "exp1")
    assert code == 0
    assert "has succeeded already" in out
    assert api.created == made


def test_a_pod_that_cannot_start(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = lambda stub, job: stub.add_pod(
        job, log="", phase="Pending", waiting="ImagePullBackOff"
    )
    code, _, err = call(*TEACHER, "--run", "exp1", "--stuck_s", "1")
    assert code == 1
    message = _one_error(err)
    assert "cannot start (ImagePullBackOff: it is not there)" in message


def test_an_unreachable_cluster(
    api: ApiStub, call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = json.loads((tmp_path / "kubeconfig.json").read_text())
    config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:1"
    (tmp_path / "kubeconfig.json").write_text(json.dumps(config))
    code, _, err = call(*TEACHER)
    assert code == 1
    assert "check the cluster" in _one_error(err)


def test_a_volume_that_is_not_there(api: ApiStub, call: Any) -> None:
    image = EXAMPLE_IMAGES["cache-teacher"]
    code, _, err = call("cache-teacher", "--overlay", "hyperpod-p5", "--image", image)
    assert code == 1
    message = _one_error(err)
    assert "persistentvolumeclaim fsx-claim: not in namespace hyperpod-ns-distill" in message
    assert "make fsx-volume" in message
    assert api.created == []


def test_a_secret_that_is_not_there(api: ApiStub, call: Any) -> None:
    api.put(
        {
            "apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": {"name": "fsx-claim", "namespace": "distill"},
        }
    )  # fmt: skip
    code, _, err = call("prefetch", "--overlay", "local-kind", "--secret", "my-token")
    assert code == 1
    message = _one_error(err)
    assert "secret my-token: not in namespace distill" in message
    assert "create secret generic my-token --from-file=token=FILE" in message
    assert api.created == []


class _Kubelet:
    """Runs the pods of a Job as processes, on a volume of the test, and reports their end."""

    def __init__(self, volume: Path, work: Path) -> None:
        self.volume, self.work = volume, work
        self.commands: list[list[str]] = []

    def __call__(self, api: ApiStub, job: Object) -> None:
        documents = list(api.objects.values())
        with Node(self.work, self.volume, Isolation.LOOPBACK) as node:
            pods = [
                PodProcess(node, self._pod(job, index), documents)
                for index in range(job["spec"].get("completions", 1))
            ]
            for pod in pods:
                container = pod.pod["spec"]["containers"][0]
                self.commands.append([*container["command"], *container["args"]])
                pod.start()
            codes = [pod.process.wait(240) for pod in pods if pod.process is not None]
            failed = any(codes)
            log = "".join(pod.log for pod in pods)
            api.add_pod(job, log=log, phase="Failed" if failed else "Succeeded")
        if failed:
            api.end_job(job, "Failed", reason="BackoffLimitExceeded", completed=False)
        else:
            api.end_job(job, "Complete")

    @staticmethod
    def _pod(job: Object, index: int) -> Object:
        template = copy.deepcopy(job["spec"]["template"])
        name = f"{job['metadata']['name']}-{index}"
        annotations = {"batch.kubernetes.io/job-completion-index": str(index)}
        metadata = {**template["metadata"], "name": name, "annotations": annotations}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


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
    kubelet = _Kubelet(volume, tmp_path / "node")
    api.scripts |= {"Job": kubelet, "PyTorchJob": _ends("Succeeded")}
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
    api.scripts["Job"] = _Kubelet(volume, tmp_path / "node")
    code, _, err = call(*STUDENT, "--run", "exp1", *MODEL)
    assert code == 3
    message = _one_error(err)
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

    api.scripts |= {"Job": check, "PyTorchJob": _ends("Failed")}
    code, out, _ = call(*STUDENT, "--run", "exp1", *MODEL)
    assert (code, "complete, 3 shards" in out) == (1, True)  # and the training fails
    code, _, err = call(*STUDENT, "--run", "exp1", *MODEL)
    assert code == 3
    assert "the cache is incomplete" in _one_error(err)
    assert sum(name.startswith("Job/") for name in api.created) == 2


def test_stage_two_stops_on_another_identity(
    api: ApiStub, call: Any, volume: Path, tmp_path: Path
) -> None:
    api.scripts["Job"] = _Kubelet(volume, tmp_path / "node")
    code, _, err = call(*STUDENT, "--run", "exp1", "--cache_identity", "0123456789ab", *MODEL)
    assert code == 3
    message = _one_error(err)
    assert "a cache of identity" in message
    assert "expected 0123456789ab" in message
    assert not [name for name in api.created if name.startswith("PyTorchJob/")]


def test_prefetch_runs_once_and_again(api: ApiStub, call: Any) -> None:
    for kind, name in (("PersistentVolumeClaim", "fsx-claim"), ("Secret", "hub-token")):
        metadata = {"name": name, "namespace": "distill"}
        api.put({"apiVersion": "v1", "kind": kind, "metadata": metadata})

    def script(stub: ApiStub, job: Object) -> None:
        stub.add_pod(job, log="teacher ...\n")
        stub.end_job(job, "Complete")

    api.scripts["Job"] = script
    for _ in range(2):
        code, out, err = call("prefetch", "--overlay", "local-kind")
        assert (code, err) == (0, "")
        assert "prefetch: succeeded" in out
    assert api.created.count("Job/prefetch") == 2


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
    kubelet = _Kubelet(root, tmp_path / "node")
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
    api.scripts["Job"] = _ends("Failed", reason="PodFailurePolicy", completed=False)
    code, _, err = call(*PREPARE)
    assert code == 1
    assert "failed (PodFailurePolicy" in _one_error(err)
    api.scripts["Job"] = _never_ends
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
    assert "corpus.prepared: found s3://bucket/corpus" in _one_error(err)
    assert api.created == []


def test_jobs_and_logs(api: ApiStub, call: Any) -> None:
    assert call("jobs", "--overlay", "local-kind")[1] == "no jobs\n"
    code, _, err = call("logs", "--overlay", "local-kind", "--run", "exp1")
    assert code == 1
    assert "run exp1: no pods in namespace distill" in _one_error(err)
    api.scripts["PyTorchJob"] = _ends("Succeeded")
    call(*TEACHER, "--run", "exp1")
    listed = call("jobs", "--overlay", "local-kind")[1]
    assert "cache-teacher-exp1-" in listed
    assert "2 workers  succeeded" in listed
    assert "step 1, loss=2.5" in call("logs", "--overlay", "local-kind", "--run", "exp1")[1]


def test_a_dry_run_asks_no_cluster(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    code, out, err = call(*STUDENT, "--run", "exp1", "--dry_run")
    assert (code, err) == (0, "")
    kinds = [item["kind"] for item in yaml.safe_load_all(out)]
    assert kinds.count("PyTorchJob") == 1
