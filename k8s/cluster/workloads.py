"""The kinds that run pods here: how kubectl names them, and how their pods are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from k8s.cluster.objects import Object

__all__ = [
    "PROJECT_LABEL",
    "WORKLOADS",
    "Operator",
    "Workload",
    "address",
    "is_workload",
    "selector",
]

PROJECT_LABEL = "app.kubernetes.io/part-of=offline-distill"
"""Selects everything of this project."""

Operator = Literal["kubeflow", "hyperpod", "trainer"]
"""Whose kind of job: the training operator's, HyperPod's own operator's, Trainer v2's."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of job."""

    resource: str
    """Its full name for kubectl."""
    label: str
    """Of its pods, with the job's name as value."""


WORKLOADS = {
    "PyTorchJob": Workload("pytorchjobs.kubeflow.org", "training.kubeflow.org/job-name"),
    "HyperPodPyTorchJob": Workload("hyperpodpytorchjobs.sagemaker.amazonaws.com", "HPJob"),
    "TrainJob": Workload("trainjobs.trainer.kubeflow.org", "jobset.sigs.k8s.io/jobset-name"),
    "Job": Workload("jobs.batch", "job-name"),
}


def is_workload(item: Object) -> bool:
    """Return whether an object runs pods."""
    return item["kind"] in WORKLOADS


def address(job: Object) -> tuple[str, str, str]:
    """Return resource, name and namespace of a job or its ConfigMap."""
    metadata = job["metadata"]
    resource = WORKLOADS[job["kind"]].resource if is_workload(job) else job["kind"].lower()
    return resource, str(metadata["name"]), str(metadata.get("namespace", "default"))


def selector(job: Object) -> str:
    """Return the label selector of a job's pods."""
    return f"{WORKLOADS[job['kind']].label}={job['metadata']['name']}"
