"""What is refused, read and deleted around a job, without a cluster."""

from __future__ import annotations

from typing import Any

import pytest

from k8s.cluster.workloads import WORKLOADS
from k8s.submission.admission import refuse_second_job
from k8s.submission.job_state import final_end
from k8s.submission.submit import _of_run
from pipeline.errors import DistillError


def _object(kind: str, name: str, **status: Any) -> dict[str, Any]:
    labels = {"distill/run": "exp1", "distill/stage": "train-student"}
    return {"kind": kind, "metadata": {"name": name, "labels": labels}, "status": status}


class _Kubectl:
    """Knows one object."""

    def __init__(self, item: dict[str, Any]) -> None:
        self._item = item
        self.asked: list[str] = []

    def items(self, _namespace: str, resource: str, labels: str) -> list[dict[str, Any]]:
        self.asked.append(labels)
        return [self._item] if resource == WORKLOADS[self._item["kind"]].resource else []


def _condition(kind: str) -> dict[str, Any]:
    return {"conditions": [{"type": kind, "status": "True"}]}


@pytest.mark.parametrize("kind", ["PyTorchJob", "TrainJob", "Job"])
@pytest.mark.parametrize(
    ("status", "phase"),
    [
        ({}, "waiting"),
        (_condition("Suspended"), "waiting"),
        (_condition("Running"), "running"),
        (_condition("Succeeded"), None),
        (_condition("Failed"), None),
    ],
)
def test_a_second_job_of_a_run_waits_for_no_folder(
    kind: str, status: dict[str, Any], phase: str | None
) -> None:
    job = _object("PyTorchJob", "exp1-abc")
    kubectl: Any = _Kubectl(_object(kind, "exp1-def", **status))
    if phase is None:
        refuse_second_job(kubectl, job)
    else:
        with pytest.raises(DistillError, match=f"exp1-def is {phase}, and exp1-abc would"):
            refuse_second_job(kubectl, job)
    assert set(kubectl.asked) == {"distill/run=exp1,distill/stage=train-student"}
    itself: Any = _Kubectl(_object("PyTorchJob", "exp1-abc", **status))
    refuse_second_job(itself, job)


def _pod(code: int, message: str) -> dict[str, Any]:
    ended = {"terminated": {"exitCode": code, "message": message}}
    return {"metadata": {"name": "pod-0"}, "status": {"containerStatuses": [{"state": ended}]}}


@pytest.mark.parametrize(
    ("code", "message", "found"),
    [
        (2, "exit 2: no such model", (2, "no such model")),
        (1, "exit 3: damaged", (3, "damaged")),  # torchrun ends with 1 whatever its ranks did
        (2, "a line\nerror: no such flag", (2, "no such flag")),
        (0, "exit 2: a retry went well after all", None),
        (0, "", None),
        (1, "exit 1: the device is gone", None),
        (137, "", None),
    ],
)
def test_only_an_end_that_restarts_repeat_is_final(
    code: int, message: str, found: tuple[int, str] | None
) -> None:
    end = final_end([_pod(code, message)])
    assert (None if end is None else (end.exit_code, end.message)) == found


def test_the_config_goes_before_its_owner() -> None:
    job, config = _object("PyTorchJob", "a"), _object("ConfigMap", "a-config")
    other = _object("ServiceAccount", "b")
    assert _of_run([job, other, config]) == [config, job]
