"""Status on the cluster: the jobs of this project, and the logs of one run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence

from k8s.cluster.kubectl import Kubectl, overlay_folder, render_kustomization
from k8s.cluster.objects import Object, replica_specs
from k8s.cluster.workloads import PROJECT_LABEL, WORKLOADS
from k8s.submission.job_state import job_state
from pipeline.errors import DistillError

__all__ = ["LogFollower", "follow_logs", "list_jobs", "namespace_of"]


class LogFollower:
    """`kubectl logs -f` of the first pod, started again when its container is."""

    def __init__(self, kubectl: Kubectl, namespace: str) -> None:
        """Follow nothing yet."""
        self._kubectl = kubectl
        self._pod = ""
        self._namespace = namespace
        self._process: subprocess.Popen[str] | None = None
        self._seen = 0.0

    def keep_following(self, pods: Sequence[str]) -> None:
        """Start kubectl where none runs; called at every poll with the pods that run, sorted."""
        if not pods:
            return
        now = time.monotonic()
        if self._process is not None and self._process.poll() is None:
            self._seen = now
            return
        since = []
        if self._process is not None and self._pod == pods[0]:
            # What came since it was last seen running; a line may come twice, none is lost.
            since = [f"--since={int(now - self._seen) + 2}s"]
        self._seen, self._pod = now, pods[0]
        self._process = self._kubectl.follow(
            ["-n", self._namespace, "logs", "-f", self._pod, *since]
        )

    def drain(self) -> None:
        """Wait briefly for the last lines."""
        if self._process is not None:
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                return

    def close(self) -> None:
        """End kubectl."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()


def list_jobs(overlay: str, namespace: str | None) -> None:
    """Print one line per job: name, stage, run, workers, state."""
    kubectl, place = Kubectl(), namespace_of(overlay, namespace)
    items: list[Object] = []
    for workload in WORKLOADS.values():
        items += kubectl.items(place, workload.resource, PROJECT_LABEL)
    if not items:
        print("no jobs")
    for item in items:
        labels = item["metadata"].get("labels") or {}
        state = job_state(item)
        print(
            f"{item['metadata']['name']:<50} {labels.get('distill/run', '-'):<20} "
            f"{_workers(item):>4} workers  {state.phase}"
            f"{f' ({state.reason})' if state.reason else ''}"
        )


def _workers(item: Object) -> int:
    """Return how many pods a job of any kind asks for."""
    spec = item["spec"]
    replicas = [replica_specs(item).get("Worker", {}), *(spec.get("replicaSpecs") or [])]
    found = [part["replicas"] for part in replicas if "replicas" in part]
    nodes = (spec.get("trainer") or {}).get("numNodes")
    return int(next(iter(found), nodes or spec.get("parallelism", 1)))


def follow_logs(overlay: str, namespace: str | None, *, run: str, stage: str | None) -> None:
    """Print the logs of all pods of a run as they come.

    Raises:
        DistillError: the run has no pods.
    """
    kubectl = Kubectl()
    place = namespace_of(overlay, namespace)
    selector = f"distill/run={run}" + (f",distill/stage={stage}" if stage else "")
    pods = kubectl.ask("-n", place, "get", "pods", "-l", selector, "-o", "name").split()
    if not pods:
        raise DistillError(
            f"run {run}: no pods in namespace {place}",
            expected="a run that was submitted",
            do="list the jobs with `make jobs OVERLAY=...`",
        )
    subprocess.run(
        [
            kubectl.program, "-n", place, "logs", "-f", "-l", selector, "--prefix", "--tail=-1",
            "--max-log-requests", str(max(5, len(pods))),
        ],
        check=False,
    )  # fmt: skip


def namespace_of(overlay: str, namespace: str | None) -> str:
    """Return the namespace given, else the overlay's."""
    if namespace is not None:
        return namespace
    documents = render_kustomization(overlay_folder(overlay))
    found = (item["metadata"].get("namespace") for item in documents)
    return str(next((name for name in found if name), "default"))
