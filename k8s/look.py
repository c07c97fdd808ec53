"""Look at what runs: the jobs of this project, and the logs of one run."""

from __future__ import annotations

import json
import subprocess

from k8s.kubectl import Kubectl, overlay_folder, render_kustomization
from k8s.watch import job_state
from pipeline.errors import DistillError

__all__ = ["follow_logs", "list_jobs"]

_PROJECT = "app.kubernetes.io/part-of=offline-distil"


def list_jobs(overlay: str, namespace: str | None) -> None:
    """Print one line per job: name, stage, run, workers, state."""
    text = Kubectl().ask(
        "-n", _place(overlay, namespace), "get", "pytorchjobs.kubeflow.org", "-l", _PROJECT,
        "-o", "json",
    )  # fmt: skip
    items = json.loads(text).get("items", [])
    if not items:
        print("no jobs")
    for item in items:
        labels = item["metadata"].get("labels") or {}
        replicas = item["spec"]["pytorchReplicaSpecs"]["Worker"].get("replicas")
        state = job_state(item)
        print(
            f"{item['metadata']['name']:<50} {labels.get('distill/run', '-'):<20} "
            f"{replicas:>4} workers  {state.phase}{f' ({state.reason})' if state.reason else ''}"
        )


def follow_logs(overlay: str, namespace: str | None, *, run: str, stage: str | None) -> None:
    """Print the logs of all pods of a run as they come.

    Raises:
        DistillError: the run has no pods.
    """
    kubectl = Kubectl()
    place = _place(overlay, namespace)
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


def _place(overlay: str, namespace: str | None) -> str:
    if namespace is not None:
        return namespace
    documents = render_kustomization(overlay_folder(overlay))
    found = (item["metadata"].get("namespace") for item in documents)
    return str(next((name for name in found if name), "default"))
