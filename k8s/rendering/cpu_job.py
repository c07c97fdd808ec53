"""A stage's own pod as a Job on CPUs: the same volume, configuration and security, no devices."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from k8s.cluster.objects import Object, pod_spec, replica_specs
from k8s.rendering.render import RenderedJob

__all__ = ["cpu_job"]

# An accelerator's share of it would be more than the memory that such a pod asks for.
_SHARED_MEMORY = "256Mi"
_DISK = {"requests": {"ephemeral-storage": "1Gi"}, "limits": {"ephemeral-storage": "12Gi"}}


def cpu_job(
    rendered: RenderedJob,
    *,
    stage: str,
    name: str,
    command: Sequence[str],
    flags: Sequence[str] = (),
    cpu: str,
    memory: str,
    memory_limit: str,
) -> Object:
    """Return a Job of one pod that runs another command where a stage's worker would run.

    Its requests replace the worker's, GPUs and EFA included; the node's type is dropped. The
    labels of a queue stay.

    Args:
        rendered: the stage.
        stage: the label `distill/stage` of the job and its pods.
        name: of the job.
        command: instead of the stage's; it gets the stage's arguments.
        flags: further arguments, above the configuration.
        cpu: requested.
        memory: requested.
        memory_limit: at which the pod is killed.
    """
    spec = copy.deepcopy(pod_spec(rendered.job))
    # The images are built for it; small nodes may be of another.
    spec["nodeSelector"] = {"kubernetes.io/arch": "amd64"}
    spec["restartPolicy"] = "Never"
    container = spec["containers"][0]
    container["command"] = list(command)
    container["args"] = [*container["args"], *flags]
    container["resources"] = {
        "requests": {"cpu": cpu, "memory": memory, **_DISK["requests"]},
        "limits": {"memory": memory_limit, **_DISK["limits"]},
    }
    for volume in spec["volumes"]:
        if (volume.get("emptyDir") or {}).get("medium") == "Memory":
            volume["emptyDir"]["sizeLimit"] = _SHARED_MEMORY
        elif "emptyDir" in volume:
            volume["emptyDir"]["sizeLimit"] = "10Gi"
    worker = replica_specs(rendered.job)["Worker"]["template"]["metadata"]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": rendered.namespace,
            "labels": {**rendered.job["metadata"]["labels"], "distill/stage": stage},
        },
        "spec": {
            "template": {
                "metadata": {"labels": {**worker["labels"], "distill/stage": stage}},
                "spec": spec,
            },
        },
    }
