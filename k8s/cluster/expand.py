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
    """Return the pods of a job, Master first, workers by index.

    Args:
        job: the PyTorchJob, checked.
        operator: which generation of the operator.
    """
    pods = []
    for replica in ("Master", "Worker"):
        spec = replica_specs(job).get(replica)
        if spec is not None:
            for index in range(int(spec.get("replicas", 1))):
                pods.append(_pod(job, replica, spec, index, operator))
    return pods


def _pod(job: Object, replica: str, spec: dict[str, Any], index: int, operator: Operator) -> Object:
    metadata = job["metadata"]
    name = f"{metadata['name']}-{replica.lower()}-{index}"
    template = copy.deepcopy(spec["template"])
    has_master = "Master" in replica_specs(job)
    labels = {
        **(template.get("metadata", {}).get("labels") or {}),
        "training.kubeflow.org/job-name": metadata["name"],
        "training.kubeflow.org/operator-name": "pytorchjob-controller",
        "training.kubeflow.org/replica-type": replica.lower(),
        "training.kubeflow.org/replica-index": str(index),
    }
    if replica == "Master" or (not has_master and index == 0):
        labels["training.kubeflow.org/job-role"] = "master"
    pod: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": metadata.get("namespace", "default"),
            "labels": labels,
            "annotations": dict(template.get("metadata", {}).get("annotations") or {}),
        },
        "spec": template["spec"],
    }
    # Pods have no policy ExitCode: the operator reads the exit code and recreates the pod.
    policy = spec.get("restartPolicy", "OnFailure")
    pod["spec"]["restartPolicy"] = "Never" if policy == "ExitCode" else policy
    environment = _environment(job, replica, index, operator)
    for container in pod["spec"]["containers"]:
        container.setdefault("env", []).extend(
            {"name": key, "value": value} for key, value in environment.items()
        )
    if has_master and replica == "Worker":
        pod["spec"].setdefault("initContainers", []).append(_wait_for_master(metadata["name"]))
    return pod


def _environment(job: Object, replica: str, index: int, operator: Operator) -> dict[str, str]:
    spec = job["spec"]
    specs = replica_specs(job)
    total = sum(int(item.get("replicas", 1)) for item in specs.values())
    nproc = str(spec.get("nprocPerNode", "auto"))
    environment = {"PYTHONUNBUFFERED": "1"}
    if "Master" in specs:
        master = f"{job['metadata']['name']}-master-0"
        rank = index if replica == "Master" else index + 1
        world_size = total * (int(nproc) if nproc.isdigit() else 1)
        for prefix in ("", "PET_"):
            environment[f"{prefix}MASTER_ADDR"] = master
            environment[f"{prefix}MASTER_PORT"] = str(_PORT)
        environment |= {
            "WORLD_SIZE": str(world_size), "RANK": str(rank), "PET_NODE_RANK": str(rank),
        }  # fmt: skip
    if "Master" in specs or operator == "v1.9.4":
        environment["PET_NPROC_PER_NODE"] = nproc
    elastic = spec.get("elasticPolicy")
    if elastic is None:
        environment["PET_NNODES"] = str(total)
        return environment
    workers = specs["Worker"].get("replicas", 1)
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


def _wait_for_master(job: str) -> dict[str, Any]:
    """The init container that a Master brings, as the operator writes it: no security context."""
    wait = f"until nslookup {job}-master-0; do echo waiting for master; sleep 2; done;"
    return {
        "name": "init-pytorch",
        "image": "alpine:3.10",
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", wait],
        "resources": {
            "limits": {"cpu": "100m", "memory": "20Mi"},
            "requests": {"cpu": "50m", "memory": "10Mi"},
        },
    }
