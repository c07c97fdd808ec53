"""The corpus of stage one prepared apart: an Indexed Job on CPUs, from stage one's own pod."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Final

from k8s.checks.job_rules import gpus_of
from k8s.checks.validate import check_documents
from k8s.cluster.instances import INSTANCES, quantity
from k8s.cluster.objects import Object, main_container, pod_spec
from k8s.rendering.cpu_job import cpu_job
from k8s.rendering.indexed_job import indexed_spec, number_by_index
from k8s.rendering.render import RenderedJob, check_run_name
from pipeline.api.settings import TeacherRun
from pipeline.config import fingerprint
from pipeline.errors import ConfigError

__all__ = ["prepare_corpus_job"]

_STAGE: Final = "prepare-corpus"
_PROCESSES = 7
"""Of a worker where the overlay's are for GPUs: a node of 8 CPUs, less its system's share, takes
one such worker, and a node of 16 takes two."""


def prepare_corpus_job(
    teacher: RenderedJob, *, workers: int, node_selector: str | None = None
) -> RenderedJob:
    """Return the Job that prepares the corpus which this run of stage one would read.

    It is the teacher's own pod (image, ConfigMap, volumes, account, security, environment,
    tolerations, affinity) without its devices. Workers share the units by leases, so any of them
    may be killed and their number changes nothing but the time.

    Args:
        teacher: the run of stage one, rendered.
        workers: how many pods.
        node_selector: labels of the nodes to use, `key=value`, several with commas; None: any.

    Raises:
        ConfigError: a name is too long, or no node selector.
    """
    assert isinstance(teacher.settings, TeacherRun)
    check_run_name(_STAGE, teacher.run)
    processes = teacher.settings.corpus.processes or _default_processes(teacher.job)
    # A process takes about 0.6 GB, most of it transformers and the tokenizer; the parent reads
    # summaries alone. Without a flag as many would start as the node has cores.
    memory = f"{2 + processes}Gi"
    job = cpu_job(
        teacher,
        stage=_STAGE,
        name=_STAGE,
        command=["python", "-m", "stages.prepare_corpus"],
        flags=[f"--corpus.processes={processes}"],
        cpu=str(processes),
        memory=memory,
        memory_limit=memory,
    )
    job["spec"] = {**indexed_spec(workers), **job["spec"]}
    spec = pod_spec(job)
    number_by_index(main_container(job))
    _avoid_gpu_nodes(spec)
    if node_selector is not None:
        spec["nodeSelector"] |= _labels(node_selector)
    job["metadata"]["name"] = f"{_STAGE}-{teacher.run}-{fingerprint([job])[:8]}"
    documents = [item for item in teacher.documents if item["kind"] != "PyTorchJob"] + [job]
    check_documents(documents, source=_STAGE)
    return dataclasses.replace(teacher, stage=_STAGE, documents=documents)


def _default_processes(teacher: Object) -> int:
    """As many as an overlay without GPUs gives its workers CPUs; else what fits common nodes."""
    container = main_container(teacher)
    if gpus_of(container):
        return _PROCESSES
    return max(1, int(quantity(container["resources"]["requests"]["cpu"])))


def _avoid_gpu_nodes(spec: dict[str, Any]) -> None:
    """Prefer nodes without GPUs: a student's worker asks for nearly all CPUs of a node.

    The overlay's own preference, for nodes that passed the deep health check, is one for GPU nodes.
    """
    affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    affinity["preferredDuringSchedulingIgnoredDuringExecution"] = [
        {
            "weight": 100,
            "preference": {
                "matchExpressions": [
                    {
                        "key": "node.kubernetes.io/instance-type",
                        "operator": "NotIn",
                        "values": list(INSTANCES),
                    }
                ]
            },
        }
    ]


def _labels(text: str) -> dict[str, str]:
    found = {}
    for part in text.split(","):
        if not re.fullmatch(r"([a-z0-9.-]+/)?[A-Za-z0-9][\w.-]*=[\w.-]*", part.strip()):
            raise ConfigError(
                f"node_selector: found {part.strip()!r}",
                expected="labels of nodes, key=value, several with commas",
                do="give NODE_SELECTOR=node.kubernetes.io/instance-type=ml.m5.4xlarge, for example",
            )
        key, _, value = part.strip().partition("=")
        found[key] = value
    return found
