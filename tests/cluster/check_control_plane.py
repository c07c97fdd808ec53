"""Renders, and submit, follow, fail, clash, scale, tear down on a real API server.

`make test-control-plane`; the name keeps the file out of other runs, as the server is built first.
"""

from __future__ import annotations

import json
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

PLACE = ("--overlay", "local-kind")
TEACHER = ("cache-teacher", *PLACE, "--run", "exp1", "--poll_s", "1")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("server")) as server:
        for name in ("distill", "hyperpod-ns-distill", "hyperpod-ns-research"):
            server.kubectl("create", "namespace", name)
        yield server


@pytest.fixture(autouse=True)
def clean(server: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    monkeypatch.setenv("HOME", str(tmp_path))
    server.kubectl("delete", "pytorchjobs,pods", "--all", "-n", "distill", "--force")


def test_every_render_is_admitted_and_kept(server: ControlPlane) -> None:
    """With kubectl's own validation; read back, no field is lost."""
    for title, render in every_render():
        documents = render()
        for item in documents:
            if item["kind"] == "Job":  # fields that are younger than this server
                for name in ("completionMode", "podFailurePolicy"):
                    item["spec"].pop(name, None)
        text = dump_documents(documents)
        for more in (["--dry-run=server"], []):
            server.kubectl("apply", "--validate=strict", *more, "-f", "-", stdin=text)
        found = json.loads(server.kubectl("get", "-f", "-", "-o", "json", stdin=text) or "")
        kept = {name_of(item): item for item in found.get("items", [found])}
        for item in documents:
            assert not list(lost(item, kept[name_of(item)])), (title, name_of(item))
        gone = [item for item in documents if item["kind"] != "Namespace"]
        server.kubectl("delete", "--wait=false", "-f", "-", stdin=dump_documents(gone))


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


class Operator:
    """Makes the pods of each new job, and does with it what `step` says."""

    def __init__(self, server: ControlPlane) -> None:
        self.server, self._stop, self._seen = server, threading.Event(), set[str]()
        self.step: Callable[[Object], None] | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def jobs(self) -> list[Object]:
        text = self.server.kubectl("get", "pytorchjobs", "-n", "distill", "-o", "json") or ""
        found: list[Object] = json.loads(text)["items"]
        return found

    def report(self, kind: str, name: str, status: Object) -> None:
        self.server.kubectl(
            "patch", kind, name, "-n", "distill", "--subresource=status", "--type=merge", "-p",
            json.dumps({"status": status}),
        )  # fmt: skip

    def end(self, job: Object, kind: str) -> None:
        condition = {"type": kind, "status": "True", "reason": f"Job{kind}", "message": "said so"}
        status: Object = {"conditions": [condition]}
        if kind != "Running":
            status["completionTime"] = "2026-11-24T12:30:00Z"
        self.report("pytorchjob", job["metadata"]["name"], status)

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            for job in self.jobs() if self.step else []:
                if self.step and job["metadata"]["uid"] not in self._seen:
                    self._seen.add(job["metadata"]["uid"])
                    # Those of a deleted job go with it, where there is a garbage collector.
                    self.server.kubectl("delete", "pods", "--all", "-n", "distill", "--force")
                    self.server.kubectl("create", "-f", "-", stdin=dump_documents(pods_for(job)))
                    self.end(job, "Running")
                    self.step(job)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def operator(server: ControlPlane) -> Iterator[Operator]:
    operator = Operator(server)
    yield operator
    operator.close()


def test_success_and_failure(server: ControlPlane, operator: Operator, call: Any) -> None:
    def end(kind: str) -> Callable[[Object], None]:
        def step(job: Object) -> None:
            time.sleep(2)
            operator.end(job, kind)

        return step

    operator.step = end("Failed")
    code, _, err = call(*TEACHER, "--timeout_s", "90")
    assert (code, "failed (JobFailed: said so)" in one_error(err)) == (1, True)
    operator.step = end("Succeeded")
    code, out, err = call(*TEACHER, "--timeout_s", "90")
    assert (code, err, "failed before (JobFailed" in out) == (0, "", True)
    (job,) = operator.jobs()
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    path = "-o=jsonpath={.metadata.ownerReferences[0].uid}"
    assert server.kubectl("get", "configmap", name, "-n", "distill", path) == uid
    assert "has succeeded already" in call(*TEACHER)[1]
    assert "2 workers  succeeded" in call("jobs", *PLACE)[1]


def test_follow_clash_and_scale(server: ControlPlane, operator: Operator, call: Any) -> None:
    operator.step = lambda _job: None
    assert call(*TEACHER, "--timeout_s", "6")[0] == 124
    code, out, _ = call(*TEACHER, "--timeout_s", "3")
    assert (code, "already; following it" in out) == (124, True)
    code, _, err = call(*TEACHER, "--nodes", "3")
    assert (code, "it is not submitted" in one_error(err)) == (1, True)
    name = operator.jobs()[0]["metadata"]["name"]
    server.kubectl("scale", "-n", "distill", f"pytorchjob/{name}", "--replicas=5")
    assert operator.jobs()[0]["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 5


def test_an_end_that_restarts_repeat(operator: Operator, call: Any) -> None:
    def step(job: Object) -> None:
        ended = {"terminated": {"exitCode": 2, "message": "exit 2: alpha: found 3."}}
        container = {
            "name": "pytorch",
            "restartCount": 1,
            "ready": True,
            "image": "",
            "imageID": "",
        }
        status = {"phase": "Running", "containerStatuses": [{**container, "lastState": ended}]}
        operator.report("pod", f"{job['metadata']['name']}-worker-1", status)

    operator.step = step
    code, _, err = call(*TEACHER, "--timeout_s", "90")
    assert (code, "exit code 2: alpha: found 3" in one_error(err)) == (2, True)
    assert operator.jobs() == []


def test_teardown(server: ControlPlane, call: Any) -> None:
    assert call(*TEACHER, "--timeout_s", "2")[0] == 124
    volume = ("--file_system", "fs-0123456789abcdef0", "--mount_name", "abcdefgh")
    for said in ("persistentvolumeclaims: fsx-claim", "kept: file system fs-0123456789abcdef0"):
        code, out, err = call("teardown", *PLACE, "--yes", "true")
        assert (code, err, said in out) == (0, "", True)
        # The overlay's own claim has gone; another, of a file system, takes its place.
        if said.startswith("persistent"):
            assert call("fsx-volume", *PLACE, *volume, "--region", "us-west-2")[0] == 0
    kinds = "pytorchjobs,jobs,configmaps,networkpolicies,serviceaccounts,persistentvolumeclaims"
    label = ("-l", "app.kubernetes.io/part-of=offline-distill", "-o", "name")
    assert server.kubectl("get", "-n", "distill", kinds, *label) == ""
    assert server.kubectl("get", "persistentvolumes", *label) == ""
