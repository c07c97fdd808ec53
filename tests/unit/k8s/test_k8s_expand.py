"""The operator's pods: names, labels and the environment of both generations, against a table."""

from __future__ import annotations

from typing import Any

import pytest

from k8s.cluster.expand import OPERATORS, Operator, pods_for
from k8s.cluster.objects import Object


def _job(*, elastic: bool) -> Object:
    template = {
        "metadata": {"labels": {"own": "label"}},
        "spec": {"containers": [{"name": "pytorch", "image": "i", "env": [{"name": "A"}]}]},
    }
    worker = {"replicas": 2, "restartPolicy": "OnFailure", "template": template}
    spec: dict[str, Any] = {"pytorchReplicaSpecs": {"Worker": worker}}
    if elastic:
        spec["elasticPolicy"] = {
            "minReplicas": 2, "maxReplicas": 2, "rdzvBackend": "c10d", "maxRestarts": 0,
            "rdzvConf": [{"key": "join_timeout", "value": "1800"}, {"key": "a", "value": "b"}],
        }  # fmt: skip
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "job", "namespace": "place"},
        "spec": spec,
    }


def _environment(pod: Object) -> dict[str, str]:
    variables = pod["spec"]["containers"][0]["env"]
    return {item["name"]: item["value"] for item in variables if "value" in item}


ELASTIC = {
    "PET_RDZV_ENDPOINT": "job-worker-0:23456", "PET_RDZV_BACKEND": "c10d", "PET_NNODES": "2:2",
    "PET_MAX_RESTARTS": "0", "PET_RDZV_CONF": "join_timeout=1800,a=b",
}  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "job", "wanted"),
    [
        ("v1.9.4", _job(elastic=False),
         [{"PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto"}] * 2),
        ("hyperpod-2023", _job(elastic=False), [{"PET_NNODES": "2"}] * 2),
        ("v1.9.4", _job(elastic=True),
         [{**ELASTIC, "PET_NPROC_PER_NODE": "auto"}] * 2),
        ("hyperpod-2023", _job(elastic=True), [ELASTIC] * 2),
    ],
)  # fmt: skip
def test_the_environment(operator: Operator, job: Object, wanted: list[dict[str, str]]) -> None:
    found = [_environment(pod) for pod in pods_for(job, operator)]
    assert found == [{"PYTHONUNBUFFERED": "1", **variables} for variables in wanted]


@pytest.mark.parametrize("operator", OPERATORS)
def test_names_and_labels(operator: Operator) -> None:
    pods = pods_for(_job(elastic=True), operator)
    assert [pod["metadata"]["name"] for pod in pods] == ["job-worker-0", "job-worker-1"]
    assert {pod["metadata"]["namespace"] for pod in pods} == {"place"}
    labels = [pod["metadata"]["labels"] for pod in pods]
    assert [item["training.kubeflow.org/replica-index"] for item in labels] == ["0", "1"]
    assert [item.get("training.kubeflow.org/job-role") for item in labels] == ["master", None]
    assert all(item["own"] == "label" for item in labels)


def test_the_job_itself_is_left_alone() -> None:
    job = _job(elastic=True)
    before = repr(job)
    pods_for(job)
    assert repr(job) == before
