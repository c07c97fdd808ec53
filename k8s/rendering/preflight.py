"""The preflight check of stage two: a CPU job that reads the cache before GPUs are requested."""

from __future__ import annotations

from k8s.checks.validate import check_documents
from k8s.cluster.objects import Object, pod_spec
from k8s.rendering.cpu_job import cpu_job
from k8s.rendering.render import RenderedJob

__all__ = ["check_cache_job"]


def check_cache_job(rendered: RenderedJob, *, cache_identity: str | None) -> list[Object]:
    """Return a small CPU Job that says whether stage two could start, with its ConfigMap.

    It is the student's own pod (image, volumes, security, configuration) without its devices, so
    it sees the volume as the student would.
    """
    flags = [f"--world_size={rendered.world_size}"]
    if cache_identity:
        flags.append(f"--cache_identity={cache_identity}")
    job = cpu_job(
        rendered,
        stage="check-cache",
        name=f"check-{rendered.name}",
        command=["python", "-m", "stages.check_cache"],
        flags=flags,
        cpu="500m",
        memory="2Gi",
        memory_limit="4Gi",
    )
    # Small and short: any node takes it, and it waits in no queue.
    pod_spec(job).pop("affinity", None)
    pod_spec(job)["terminationGracePeriodSeconds"] = 5
    labels = job["metadata"]["labels"]
    for label in [name for name in labels if name.startswith("kueue")]:
        del labels[label]
    # A rejected cache is a result: the job is not retried.
    job["spec"] = {"backoffLimit": 0, "ttlSecondsAfterFinished": 3600, **job["spec"]}
    documents = [item for item in rendered.documents if item["kind"] != "PyTorchJob"] + [job]
    check_documents(documents, source="check-cache")
    return documents
