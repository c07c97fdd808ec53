"""The preflight check of stage two: a CPU job that reads the cache before GPUs are requested."""

from __future__ import annotations

import copy

from k8s.checks.validate import check_documents
from k8s.cluster.objects import Object, pod_spec
from k8s.rendering.render import RenderedJob

__all__ = ["check_cache_job"]


def check_cache_job(rendered: RenderedJob, *, cache_identity: str | None) -> list[Object]:
    """Return a small CPU Job that says whether stage two could start, with its ConfigMap.

    It is the student's own pod (image, volumes, security, configuration) without its devices, so
    it sees the volume as the student would.
    """
    student = rendered.job
    name = f"check-{rendered.name}"
    spec = copy.deepcopy(pod_spec(student))
    for field in ("nodeSelector", "affinity"):
        spec.pop(field, None)
    spec["restartPolicy"] = "Never"
    spec["terminationGracePeriodSeconds"] = 5
    container = spec["containers"][0]
    container["command"] = ["python", "-m", "stages.check_cache"]
    container["args"] = [*container["args"], f"--world_size={rendered.world_size}"]
    if cache_identity:
        container["args"].append(f"--cache_identity={cache_identity}")
    container["resources"] = {
        "requests": {"cpu": "500m", "memory": "2Gi"},
        "limits": {"memory": "4Gi"},
    }
    for volume in spec["volumes"]:
        if (volume.get("emptyDir") or {}).get("medium") == "Memory":
            volume["emptyDir"]["sizeLimit"] = "256Mi"
    labels = {**student["metadata"]["labels"], "distill/stage": "check-cache"}
    for label in [name for name in labels if name.startswith("kueue")]:
        del labels[label]
    job: Object = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": rendered.namespace, "labels": labels},
        "spec": {
            # A rejected cache is a result: the job is not retried.
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": 3600,
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }
    documents = [item for item in rendered.documents if item["kind"] != "PyTorchJob"] + [job]
    check_documents(documents, source="check-cache")
    return documents
