"""Before a job waits or runs: what it needs is there, no other job does its work; then apply it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from k8s.cluster.kubectl import Kubectl
from k8s.cluster.objects import Object, dump_documents, find
from k8s.cluster.workloads import WORKLOADS, address, is_workload
from k8s.submission.job_state import job_state
from pipeline.errors import DistillError

__all__ = ["apply", "refuse_second_job", "require"]


def apply(kubectl: Kubectl, documents: Sequence[Object], *, own: bool = True) -> None:
    """Apply objects, the workload last.

    Args:
        kubectl: of the cluster.
        documents: the objects.
        own: the ConfigMaps belong to the workload, and go when it is deleted.

    Raises:
        DistillError: the API server rejects one of them.
    """
    order = sorted(documents, key=lambda item: (item["kind"] != "Namespace", is_workload(item)))
    done = kubectl.run("apply", "-f", "-", stdin=dump_documents(order))
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        resources = [address(item)[0] for item in documents if is_workload(item)]
        raise DistillError(
            f"the API server rejects it: {' '.join(lines)[:1000]}",
            expected="objects that this cluster knows"
            + "".join(f" (kubectl get crd {name})" for name in resources if name != "jobs.batch"),
        )
    print(done.stdout.strip(), flush=True)
    for job in filter(is_workload, documents if own else ()):
        _own(kubectl, job, [item for item in documents if item["kind"] == "ConfigMap"])


def refuse_second_job(kubectl: Kubectl, job: Object) -> None:
    """Reject a job beside an unfinished one of the same run and stage: another name or kind.

    Its name is a digest of everything in it, so that another number of nodes or a rebuilt image is
    another job; both would write into one folder.

    Raises:
        DistillError: naming the other one.
    """
    resource, name, namespace = address(job)
    labels = job["metadata"].get("labels") or {}
    wanted = ",".join(f"{key}={labels.get(key)}" for key in ("distill/run", "distill/stage"))
    for workload in WORKLOADS.values():  # another OPERATOR= is a job of another kind
        for other in kubectl.items(namespace, workload.resource, wanted):
            state, found = job_state(other), str(other["metadata"]["name"])
            itself = (workload.resource, found) == (resource, name)
            if not itself and state.phase in ("waiting", "running"):
                raise DistillError(
                    f"run {labels.get('distill/run')}: {found} is {state.phase}, and {name} would "
                    "write into the same folder; it is not submitted",
                    expected="one unfinished job of a run and stage",
                    do=f"end it with `kubectl -n {namespace} delete {workload.resource} {found}` "
                    "(this one goes on where it stopped), give exactly its settings to follow it, "
                    "or another RUN=",
                )


def require(kubectl: Kubectl, documents: Sequence[Object], namespace: str) -> None:
    """Reject what would wait indefinitely: a PersistentVolumeClaim or Secret is missing.

    Raises:
        DistillError: naming it, and how to create it.
    """
    text = json.dumps([item for item in documents if is_workload(item)])
    if '"claimName": "fsx-claim"' in text and find(documents, "PersistentVolumeClaim") is None:
        _require(
            kubectl, "persistentvolumeclaim", "fsx-claim", namespace,
            do="create it with `make fsx-volume` (k8s/README.md, The volume)",
        )  # fmt: skip
    for item in documents:
        if item["kind"] != "Job":
            continue
        for volume in item["spec"]["template"]["spec"].get("volumes") or []:
            if "secret" in volume:
                name = volume["secret"]["secretName"]
                _require(
                    kubectl, "secret", name, namespace,
                    do=f"create it with `kubectl -n {namespace} create secret generic {name} "
                    "--from-file=token=FILE`, or name another with SECRET=; public models and "
                    "data need none: SECRET=none",
                )  # fmt: skip


def _own(kubectl: Kubectl, job: Object, config_maps: Sequence[Object]) -> None:
    """Make a job the owner of its ConfigMaps: the garbage collector deletes them with it."""
    resource, name, namespace = address(job)
    text = kubectl.ask("-n", namespace, "get", resource, name, "-o", "json", "--ignore-not-found")
    if not text.strip():
        return  # deleted meanwhile; the watch will say so
    uid = json.loads(text)["metadata"]["uid"]
    owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": name, "uid": uid}
    patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
    for item in config_maps:
        kubectl.ask(
            "-n", namespace, "patch", "configmap", item["metadata"]["name"], "--type=merge", "-p",
            patch,
        )  # fmt: skip


def _require(kubectl: Kubectl, kind: str, name: str, namespace: str, *, do: str) -> None:
    text = kubectl.ask("-n", namespace, "get", kind, name, "-o", "name", "--ignore-not-found")
    if not text.strip():
        raise DistillError(
            f"{kind} {name}: not in namespace {namespace}",
            expected="one, before anything is submitted",
            do=do,
        )
