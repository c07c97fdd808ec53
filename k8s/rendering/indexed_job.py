"""An Indexed Job of Kubernetes itself: workers that need no rendezvous, only a number."""

from __future__ import annotations

from k8s.cluster.objects import Object
from pipeline.errors import FINAL_EXIT_CODES

__all__ = ["RESTARTS_PER_WORKER", "indexed_spec", "number_by_index"]

RESTARTS_PER_WORKER = 6
"""Before a job fails; those of all its workers are added up."""
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def indexed_spec(workers: int) -> Object:
    """Return the spec of such a Job but for its template, which must not restart its pods.

    The Job itself tells a final failure (exit codes that another try does not change) from a killed
    pod, and a drained node or a preemption from both.
    """
    return {
        "completionMode": "Indexed",
        "completions": workers,
        "parallelism": workers,
        "backoffLimit": RESTARTS_PER_WORKER * workers,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"operator": "In", "values": list(FINAL_EXIT_CODES)},
                },
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "ttlSecondsAfterFinished": 604800,
    }


def number_by_index(container: Object) -> None:
    """Take a worker's number from the Job, where a PyTorchJob's operator gives it as a label."""
    for variable in container["env"]:
        if variable["name"] == "DISTILL_REPLICA_INDEX":
            variable["valueFrom"] = {"fieldRef": {"fieldPath": _INDEX}}
