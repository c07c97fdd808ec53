"""The operator's pods: names, labels and the environment of both generations, against a table."""

from __future__ import annotations

from typing import Any

import pytest

from k8s.checks.pod_rules import restricted_mistakes
from k8s.cluster.expand import OPERATORS, Operator, pods_for
from k8s.cluster.objects import Object


def _job(*, master: bool, elastic: bool, workers: int = 2, nproc: str | None = None) -> Object:
    template = {
        "metadata": {"labels": {"own": "label"}},
        "spec": {"containers": [{"name": "pytorch", "image": "i", "env": [{"name": "A"}]}]},
    }
    specs: dict[str, Any] = {}
    if master:
        specs["Master"] = {"replicas": 1, "restartPolicy": "OnFailure", "template": template}
    specs["Worker"] = {"replicas": workers, "restartPolicy": "OnFailure", "template": template}
    spec: dict[str, Any] = {"pytorchReplicaSpecs": specs}
    if nproc:
        spec["nprocPerNode"] = nproc
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


def _of_master(rank: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "PET_MASTER_ADDR": "job-master-0",
        "PET_MASTER_PORT": "23456", "RANK": str(rank), "PET_NODE_RANK": str(rank),
        "WORLD_SIZE": "24", "PET_NNODES": "3", "PET_NPROC_PER_NODE": "8",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "job", "wanted"),
    [
        ("v1.9.4", _job(master=False, elastic=False),
         [{"PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto"}] * 2),
        ("hyperpod-2023", _job(master=False, elastic=False), [{"PET_NNODES": "2"}] * 2),
        ("v1.9.4", _job(master=False, elastic=True),
         [{**ELASTIC, "PET_NPROC_PER_NODE": "auto"}] * 2),
        ("hyperpod-2023", _job(master=False, elastic=True), [ELASTIC] * 2),
        ("v1.9.4", _job(master=True, elastic=False, nproc="8"), [_of_master(n) for n in range(3)]),
        ("hyperpod-2023", _job(master=True, elastic=False, nproc="8"),
         [_of_master(n) for n in range(3)]),
    ],
)  # fmt: skip
def test_the_environment(operator: Operator, job: Object, wanted: list[dict[str, str]]) -> None:
    found = [_environment(pod) for pod in pods_for(job, operator)]
    assert found == [{"PYTHONUNBUFFERED": "1", **variables} for variables in wanted]


@pytest.mark.parametrize("operator", OPERATORS)
def test_names_and_labels(operator: Operator) -> None:
    pods = pods_for(_job(master=False, elastic=True), operator)
    assert [pod["metadata"]["name"] for pod in pods] == ["job-worker-0", "job-worker-1"]
    assert {pod["metadata"]["namespace"] for pod in pods} == {"place"}
    labels = [pod["metadata"]["labels"] for pod in pods]
    assert [item["training.kubeflow.org/replica-index"] for item in labels] == ["0", "1"]
    assert [item.get("training.kubeflow.org/job-role") for item in labels] == ["master", None]
    assert all(item["own"] == "label" for item in labels)


def test_a_master_brings_an_init_container_that_restricted_rejects() -> None:
    pods = pods_for(_job(master=True, elastic=False))
    assert ["initContainers" in pod["spec"] for pod in pods] == [False, True, True]
    found = restricted_mistakes(pods[1])
    assert any("container init-pytorch" in line for line in found)


def test_the_job_itself_is_left_alone() -> None:
    job = _job(master=False, elastic=True)
    before = repr(job)
    pods_for(job)
    assert repr(job) == before
