"""Renders, and submit, follow, succeed, fail, clash, scale on a real API server.

`make test-control-plane`; the name keeps the file out of other runs, as the server is built first.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from k8s.cluster.expand import pods_for
from k8s.cluster.objects import Object, dump_documents, name_of
from k8s.rendering.manifests import every_render
from tests.cluster.control_plane import ControlPlane
from tests.cluster.job_ends import one_error

TEACHER = ["cache-teacher", "--overlay", "local-kind", "--run", "exp1", "--poll_s", "1"]
JOBS = "/apis/kubeflow.org/v1/namespaces/distill/pytorchjobs"
PODS = "/api/v1/namespaces/distill/pods"
RUNNING: Object = {"conditions": [{"type": "Running", "status": "True"}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("server")) as server:
        for name in ("distill", "hyperpod-ns-distill", "hyperpod-ns-research"):
            item = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            server.ask("POST", "/api/v1/namespaces", item)
        yield server


@pytest.fixture(autouse=True)
def kubectl(
    server: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    monkeypatch.setenv("HOME", str(tmp_path))
    for job in server.ask("GET", JOBS)["items"]:
        server.ask("DELETE", f"{JOBS}/{job['metadata']['name']}")
    server.ask("DELETE", f"{PODS}?gracePeriodSeconds=0")

    def run(*words: str, stdin: str | None = None) -> str:
        done = subprocess.run(
            ["kubectl", *words], input=stdin, capture_output=True, text=True, check=False
        )
        assert not done.returncode, f"{words}: {done.stderr}"
        return done.stdout

    return run


def test_every_render_is_admitted_and_kept(kubectl: Callable[..., str]) -> None:
    """With kubectl's own validation; read back, no field is lost."""
    for title, render in every_render():
        documents = render()
        for item in documents:
            if item["kind"] == "Job":  # fields that are younger than this server
                for name in ("completionMode", "podFailurePolicy"):
                    item["spec"].pop(name, None)
        if not documents:
            continue
        text = dump_documents(documents)
        for more in (["--dry-run=server"], []):
            kubectl("apply", "--validate=strict", *more, "-f", "-", stdin=text)
        found = json.loads(kubectl("get", "-f", "-", "-o", "json", stdin=text))
        kept = {name_of(item): item for item in found.get("items", [found])}
        for item in documents:
            assert not list(lost(item, kept[name_of(item)])), (title, name_of(item))
        gone = [item for item in documents if item["kind"] != "Namespace"]
        kubectl("delete", "--wait=false", "-f", "-", stdin=dump_documents(gone))


def lost(sent: Any, found: Any, path: str = "") -> Iterator[str]:
    if isinstance(sent, dict) and isinstance(found, dict):
        for key, value in sent.items():
            yield from lost(value, found.get(key), f"{path}.{key}")
    elif isinstance(sent, list) and isinstance(found, list):
        for index, value in enumerate(sent):
            yield from lost(value, found[index] if index < len(found) else None, f"{path}[{index}]")
    elif found is None:
        if sent != "":
            yield path
    elif sent != found and not path.endswith(("cpu", "memory", "sizeLimit")):  # 0.5 is 500m there
        yield f"{path}: sent {sent!r}, found {found!r}"


@pytest.fixture
def operator(server: ControlPlane) -> Iterator[list[Callable[[Object], None]]]:
    """What becomes of each new job, by the last function of this list."""
    steps: list[Callable[[Object], None]] = []
    seen: set[str] = set()
    stop = threading.Event()

    def operate() -> None:
        while not stop.wait(0.3):
            for job in server.ask("GET", JOBS)["items"]:
                if steps and job["metadata"]["uid"] not in seen:
                    seen.add(job["metadata"]["uid"])
                    # Those of a deleted job go with it, where there is a garbage collector.
                    server.ask("DELETE", f"{PODS}?gracePeriodSeconds=0")
                    for pod in pods_for({**job, "kind": "PyTorchJob"}):
                        server.ask("POST", PODS, pod)
                    steps[-1](job)

    thread = threading.Thread(target=operate)
    thread.start()
    yield steps
    stop.set()
    thread.join()


@pytest.fixture
def report(server: ControlPlane) -> Callable[[Object, Object], None]:
    """Write a job's status, as its operator does."""
    return lambda job, status: server.ask(
        "PATCH", f"{JOBS}/{job['metadata']['name']}/status", {"status": status}
    )


def ended(kind: str) -> Object:
    condition = {"type": kind, "status": "True", "reason": f"Job{kind}", "message": "said so"}
    return {"conditions": [condition], "completionTime": "2026-11-24T12:30:00Z"}


def test_success_and_failure(server: ControlPlane, operator: Any, report: Any, call: Any) -> None:
    def end(kind: str) -> Callable[[Object], None]:
        def step(job: Object) -> None:
            report(job, RUNNING)
            time.sleep(2)
            report(job, ended(kind))

        return step

    operator.append(end("Failed"))
    code, _, err = call(*TEACHER, "--timeout_s", "60")
    assert (code, "failed (JobFailed: said so)" in one_error(err)) == (1, True)
    operator.append(end("Succeeded"))
    code, out, err = call(*TEACHER, "--timeout_s", "60")
    assert (code, err) == (0, "")
    assert "failed before (JobFailed" in out
    (job,) = server.ask("GET", JOBS)["items"]
    config = server.ask("GET", f"/api/v1/namespaces/distill/configmaps/{job['metadata']['name']}")
    assert config["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    assert "has succeeded already" in call(*TEACHER)[1]
    assert "2 workers  succeeded" in call("jobs", "--overlay", "local-kind")[1]


def test_follow_clash_and_scale(
    server: ControlPlane, operator: Any, report: Any, call: Any, kubectl: Any
) -> None:
    operator.append(lambda job: report(job, RUNNING))
    assert call(*TEACHER, "--timeout_s", "3")[0] == 124
    code, out, _ = call(*TEACHER, "--timeout_s", "3")
    assert (code, "is running already; following it" in out) == (124, True)
    code, _, err = call(*TEACHER, "--nodes", "3")
    assert (code, "it is not submitted" in one_error(err)) == (1, True)
    (job,) = server.ask("GET", JOBS)["items"]
    kubectl("scale", "-n", "distill", f"pytorchjob/{job['metadata']['name']}", "--replicas=5")
    (job,) = server.ask("GET", JOBS)["items"]
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 5


def test_an_end_that_restarts_repeat(
    server: ControlPlane, operator: Any, report: Any, call: Any
) -> None:
    def step(job: Object) -> None:
        terminated = {"exitCode": 2, "message": "exit 2: alpha: found 3."}
        statuses = [{
            "name": "pytorch", "restartCount": 1, "ready": True, "image": "a", "imageID": "a",
            "state": {"running": {}}, "lastState": {"terminated": terminated},
        }]  # fmt: skip
        pod = f"{PODS}/{job['metadata']['name']}-worker-1"
        status = {"phase": "Running", "containerStatuses": statuses}
        server.ask("PATCH", f"{pod}/status", {"status": status})
        report(job, RUNNING)

    operator.append(step)
    code, _, err = call(*TEACHER, "--timeout_s", "60")
    assert (code, "exit code 2: alpha: found 3" in one_error(err)) == (2, True)
    assert server.ask("GET", JOBS)["items"] == []


def test_teardown(call: Any, kubectl: Any) -> None:
    assert call(*TEACHER, "--timeout_s", "2")[0] == 124
    place = ("--overlay", "local-kind")
    volume = ("--file_system", "fs-0123456789abcdef0", "--mount_name", "abcdefgh")
    for said in ("persistentvolumeclaims: fsx-claim", "kept: file system fs-0123456789abcdef0"):
        code, out, err = call("teardown", *place, "--yes", "true")
        assert (code, err, said in out) == (0, "", True)
        # The overlay's own claim has gone; another, of a file system, takes its place.
        if said.startswith("persistent"):
            assert call("fsx-volume", *place, *volume, "--region", "us-west-2")[0] == 0
    kinds = "pytorchjobs,jobs,configmaps,networkpolicies,serviceaccounts,persistentvolumeclaims"
    label = "app.kubernetes.io/part-of=offline-distill"
    assert kubectl("get", "-n", "distill", kinds, "-l", label, "-o", "name") == ""
    assert kubectl("get", "persistentvolumes", "-l", label, "-o", "name") == ""
