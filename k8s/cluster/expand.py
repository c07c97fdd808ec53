"""A PyTorchJob expanded into the pods that the training operator would make, environment included.

From the sources of training-operator v1.9.4 and of commit 855e0960 (August 2023), which HyperPod's
chart installs. The two differ in one variable (`PET_NPROC_PER_NODE` without a Master).
"""

from __future__ import annotations

import copy
from typing import Any, Literal

from k8s.cluster.objects import Object, replica_specs

__all__ = ["OPERATORS", "Operator", "pods_for"]

Operator = Literal["v1.9.4", "hyperpod-2023"]
OPERATORS: tuple[Operator, ...] = ("v1.9.4", "hyperpod-2023")
_PORT = 23456


def pods_for(job: Object, operator: Operator = "v1.9.4") -> list[Object]:
    """Return the pods of a job, by index; a Master, which other rules reject, is left out.

    Args:
        job: the PyTorchJob, checked.
        operator: which generation of the operator.
    """
    spec = replica_specs(job)["Worker"]
    return [_pod(job, spec, index, operator) for index in range(int(spec.get("replicas", 1)))]


def _pod(job: Object, spec: dict[str, Any], index: int, operator: Operator) -> Object:
    metadata = job["metadata"]
    template = copy.deepcopy(spec["template"])
    labels = {
        **(template.get("metadata", {}).get("labels") or {}),
        "training.kubeflow.org/job-name": metadata["name"],
        "training.kubeflow.org/operator-name": "pytorchjob-controller",
        "training.kubeflow.org/replica-type": "worker",
        "training.kubeflow.org/replica-index": str(index),
    }
    if index == 0:
        labels["training.kubeflow.org/job-role"] = "master"
    pod: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{metadata['name']}-worker-{index}",
            "namespace": metadata.get("namespace", "default"),
            "labels": labels,
            "annotations": dict(template.get("metadata", {}).get("annotations") or {}),
        },
        "spec": template["spec"],
    }
    # Pods have no policy ExitCode: the operator reads the exit code and recreates the pod.
    policy = spec.get("restartPolicy", "OnFailure")
    pod["spec"]["restartPolicy"] = "Never" if policy == "ExitCode" else policy
    environment = _environment(job, operator)
    for container in pod["spec"]["containers"]:
        container.setdefault("env", []).extend(
            {"name": key, "value": value} for key, value in environment.items()
        )
    return pod


def _environment(job: Object, operator: Operator) -> dict[str, str]:
    spec, workers = job["spec"], replica_specs(job)["Worker"].get("replicas", 1)
    environment = {"PYTHONUNBUFFERED": "1"}
    if operator == "v1.9.4":
        environment["PET_NPROC_PER_NODE"] = str(spec.get("nprocPerNode", "auto"))
    elastic = spec.get("elasticPolicy")
    if elastic is None:
        environment["PET_NNODES"] = str(workers)
        return environment
    low, high = elastic.get("minReplicas", workers), elastic.get("maxReplicas", workers)
    host = elastic.get("rdzvHost", f"{job['metadata']['name']}-worker-0")
    environment |= {
        "PET_NNODES": f"{low}:{high}",
        "PET_RDZV_ENDPOINT": f"{host}:{elastic.get('rdzvPort', _PORT)}",
        "PET_RDZV_BACKEND": str(elastic.get("rdzvBackend", "c10d")),
    }
    for key, name in (("maxRestarts", "PET_MAX_RESTARTS"), ("rdzvId", "PET_RDZV_ID")):
        if key in elastic:
            environment[name] = str(elastic[key])
    if elastic.get("rdzvConf"):
        pairs = (f"{item['key']}={item['value']}" for item in elastic["rdzvConf"])
        environment["PET_RDZV_CONF"] = ",".join(pairs)
    return environment
