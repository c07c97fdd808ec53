"""INSTANCE=: a job of an overlay on nodes of another type, with that type's share of everything."""

from __future__ import annotations

import math

from k8s.checks.job_rules import GPU, gpus_of, instance_type
from k8s.checks.pod_rules import EFA
from k8s.cluster.instances import INSTANCES, find_instance
from k8s.cluster.objects import Object, main_container, pod_spec, replica_specs
from pipeline.errors import ConfigError

__all__ = ["set_instance"]

_SELECTOR = "node.kubernetes.io/instance-type"
# What a pod of a whole node asks for; kubelet and the daemons of a HyperPod node take the rest.
_CPUS, _MEMORY, _SHARED_MEMORY = 0.92, 0.875, 0.25
_NPROC = "--nproc-per-node="


def set_instance(job: Object, name: str) -> None:
    """Put a job on another type of node: GPUs, EFA, CPUs, memory, processes.

    A student's worker takes a whole node, a teacher's one GPU and its share. The number of nodes
    stays.

    Raises:
        ConfigError: no such type, or the overlay names no type of node at all.
    """
    before = INSTANCES.get(instance_type(job) or "")
    if before is None:
        raise ConfigError(
            f"instance {name}: given for an overlay that selects no type of node",
            expected="an overlay with one, such as hyperpod",
            do="leave INSTANCE= out, or name another OVERLAY=",
        )
    found, node = find_instance(name)
    spec, container, worker = pod_spec(job), main_container(job), replica_specs(job)["Worker"]
    shares = bool(job["spec"].get("elasticPolicy"))
    gpus = node.gpus if shares else 1
    if not shares:
        nodes = max(1, int(worker["replicas"]) * gpus_of(container) // before.gpus)
        worker["replicas"] = nodes * node.gpus
    share = gpus / node.gpus
    spec["nodeSelector"][_SELECTOR] = found
    resources = container["resources"]
    for part in ("requests", "limits"):
        amounts = resources[part]
        amounts |= {"memory": f"{math.floor(_MEMORY * share * node.memory_gib)}Gi", GPU: str(gpus)}
        amounts.pop(EFA, None)
        if shares and node.efa:
            amounts[EFA] = str(node.efa)
    resources["requests"]["cpu"] = str(math.floor(_CPUS * share * node.vcpus))
    for volume in spec["volumes"]:
        directory = volume.get("emptyDir") or {}
        if directory.get("medium") == "Memory":
            directory["sizeLimit"] = f"{max(1, int(_SHARED_MEMORY * share * node.memory_gib))}Gi"
    container["command"] = [
        f"{_NPROC}{gpus}" if str(word).startswith(_NPROC) else word for word in container["command"]
    ]
