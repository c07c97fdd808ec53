"""Each rule, shown by a render that breaks it: the message names what was found and expected."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from k8s.checks.job_rules import job_mistakes
from k8s.checks.pod_rules import pod_mistakes
from k8s.checks.schema import schema_mistakes
from k8s.checks.validate import document_mistakes
from k8s.cluster.objects import Object, find, main_container, pod_spec
from k8s.rendering.manifests import EXAMPLE_IMAGES
from k8s.rendering.render import RenderedJob, render_job


@pytest.fixture(scope="module")
def student() -> RenderedJob:
    return render_job(
        stage="train-student", run="r", overlay="hyperpod", image=EXAMPLE_IMAGES["train-student"]
    )


@pytest.fixture(scope="module")
def teacher() -> RenderedJob:
    return render_job(
        stage="cache-teacher", run="r", overlay="hyperpod", instance="p4d",
        image=EXAMPLE_IMAGES["cache-teacher"],
    )  # fmt: skip


def _worker(job: Object) -> Any:
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]


def _resources(job: Object, name: str, value: str) -> None:
    for part in ("requests", "limits"):
        main_container(job)["resources"][part][name] = value


def _env(job: Object, name: str, value: str) -> None:
    variables = main_container(job)["env"]
    variables[:] = [item for item in variables if item["name"] != name]
    variables.append({"name": name, "value": value})


def _container(job: Object) -> dict[str, Any]:
    return main_container(job)


# What is broken, and what the message must hold.
STUDENT: dict[str, tuple[Callable[[Object], Any], str]] = {
    "an unknown field": (lambda j: j["spec"].update(foo=1), "spec.foo: unknown field"),
    "an unknown field deep down": (
        lambda j: _container(j).update(imagePullPolcy="Always"), "imagePullPolcy: unknown field",
    ),
    "a wrong type": (lambda j: _worker(j).update(replicas="2"), "expected a whole number"),
    "a long name": (lambda j: j["metadata"].update(name="a" * 51), "at most 50"),
    "no container of the operator's": (
        lambda j: _container(j).update(name="main"), "expected one named pytorch",
    ),
    "no worker": (lambda j: _worker(j).update(replicas=0), "expected at least 1"),
    "a range of workers": (
        lambda j: j["spec"]["elasticPolicy"].update(minReplicas=1),
        "found minReplicas 1 and maxReplicas 2, expected both to equal Worker.replicas (2)",
    ),
    "restarts of torchrun": (
        lambda j: j["spec"]["elasticPolicy"].update(maxRestarts=3), "maxRestarts: found 3",
    ),
    "etcd": (
        lambda j: j["spec"]["elasticPolicy"].update(rdzvBackend="etcd"), "Backend: found 'etcd'",
    ),
    "an autoscaler": (
        lambda j: j["spec"]["elasticPolicy"].update(
            metrics=[{"type": "Resource", "resource": {"name": "cpu", "target": {"type": "V"}}}]
        ),
        "metrics: found some",
    ),
    "no elastic policy": (lambda j: j["spec"].pop("elasticPolicy"), "each worker trains alone"),
    "processes that are not the GPUs": (
        lambda j: _container(j).update(command=["torchrun", "--nproc-per-node=4", "-m", "x"]),
        "--nproc-per-node: found 4, expected the container's GPUs (8)",
    ),
    "no number of processes": (
        lambda j: _container(j).update(command=["torchrun", "-m", "x"]), "no --nproc-per-node",
    ),
    "a checkpoint that is cut off": (
        lambda j: _env(j, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"),
        "found 600, expected seconds below the pod's terminationGracePeriodSeconds (600)",
    ),
    "torchrun's own grace": (
        lambda j: _container(j).update(
            env=[e for e in _container(j)["env"] if not e["name"].startswith("TORCH_ELASTIC")]
        ),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT: found none (torchrun's is 30)",
    ),
    "a temporary folder without a bound": (
        lambda j: pod_spec(j)["volumes"].append({"name": "t", "emptyDir": {}}),
        "volume t: found no sizeLimit",
    ),
    "a disk without a request": (
        lambda j: _container(j)["resources"]["requests"].pop("ephemeral-storage"),
        "ephemeral-storage: expected a request and a limit",
    ),
    "another launcher": (
        lambda j: _container(j).update(command=["accelerate", "--nproc-per-node=8"]),
        "expected torchrun",
    ),
    "more GPUs than there are": (
        lambda j: _resources(j, "nvidia.com/gpu", "16"),
        "nvidia.com/gpu: found 16, expected a divisor of the 8 that ml.p5.48xlarge has",
    ),
    "the EFA of another type": (
        lambda j: _resources(j, "vpc.amazonaws.com/efa", "16"), "expected 32 and 8",
    ),
    "an unknown type": (
        lambda j: pod_spec(j).update(nodeSelector={"node.kubernetes.io/instance-type": "ml.p9"}),
        "found ml.p9, expected one of ml.g6e.2xlarge",
    ),
    "more memory than the node has": (
        lambda j: _resources(j, "memory", "2000Gi"), "found 2000Gi, expected at most 1905Gi",
    ),
    "more shared memory than memory": (
        lambda j: _resources(j, "memory", "100Gi"), "volume shm: found 512Gi in memory",
    ),
    "requests that are not the limits": (
        lambda j: _container(j)["resources"]["requests"].update({"nvidia.com/gpu": "4"}),
        "nvidia.com/gpu: found 4 requested and a limit of 8",
    ),
    "another namespace": (
        lambda j: j["metadata"].update(namespace="ml"), "expected kubeflow or one that starts with",
    ),
    "no auto-resume": (lambda j: j["metadata"].pop("annotations"), "enable-job-auto-resume"),
    "a policy without resume": (
        lambda j: _worker(j).update(restartPolicy="ExitCode"), "expected OnFailure",
    ),
    "no toleration": (lambda j: pod_spec(j).pop("tolerations"), "tolerations: expected one"),
    "no affinity": (lambda j: pod_spec(j).pop("affinity"), "expected node affinity"),
    "a field the old operator does not know": (
        lambda j: j["spec"]["runPolicy"].update(managedBy="kueue.x-k8s.io/multikueue"),
        "found managedBy, which the operator that HyperPod installs does not know",
    ),
    "root": (
        lambda j: pod_spec(j)["securityContext"].update(runAsUser=0),
        "expected runAsNonRoot and a numeric runAsUser other than 0",
    ),
    "escalation": (
        lambda j: _container(j)["securityContext"].update(allowPrivilegeEscalation=True),
        "expected allowPrivilegeEscalation: false",
    ),
    "capabilities": (
        lambda j: _container(j)["securityContext"]["capabilities"].update(add=["IPC_LOCK"]),
        "expected capabilities that drop ALL",
    ),
    "a root file system to write to": (
        lambda j: _container(j)["securityContext"].pop("readOnlyRootFilesystem"),
        "expected readOnlyRootFilesystem: true",
    ),
    "no seccomp": (
        lambda j: pod_spec(j)["securityContext"].pop("seccompProfile"), "expected seccompProfile",
    ),
    "shared memory of the host": (
        lambda j: pod_spec(j)["volumes"].append({"name": "h", "hostPath": {"path": "/dev/shm"}}),
        "volume h: found hostPath",
    ),
    "shared memory on a disk": (
        lambda j: pod_spec(j)["volumes"].__setitem__(
            [v["name"] for v in pod_spec(j)["volumes"]].index("shm"),
            {"name": "shm", "emptyDir": {}},
        ),
        "/dev/shm: expected an emptyDir in memory",
    ),
    "a token of the account": (
        lambda j: pod_spec(j).pop("automountServiceAccountToken"),
        "expected automountServiceAccountToken: false",
    ),
    "a command that a patch took away": (
        lambda j: _container(j).pop("command"), "expected torchrun",
    ),
    "a mount without volume": (
        lambda j: _container(j)["volumeMounts"].append({"name": "n", "mountPath": "/n"}),
        "mount /n: no volume 'n'",
    ),
    "a shell": (
        lambda j: _container(j).update(command=["bash", "-c", "torchrun --nproc-per-node=8"]),
        "found a shell (bash)",
    ),
    "latest": (lambda j: _container(j).update(image="a.b/c:latest"), "expected a tag other than"),
    "no registry": (
        lambda j: _container(j).update(image="distill-student:1"), "run `make push-images`",
    ),
    "a ConfigMap of another name": (
        lambda j: pod_spec(j)["volumes"].append({"name": "c", "configMap": {"name": "gone"}}),
        "ConfigMap 'gone': not in the render",
    ),
    "a token in the environment": (
        lambda j: _env(j, "HF_TOKEN", "x"), "environment HF_TOKEN: found a literal",
    ),
    "a token in the arguments": (
        lambda j: _container(j)["args"].append("--x=hf_" + "a1" * 17), "looks like a token",
    ),
    "a Secret": (
        lambda j: pod_spec(j)["volumes"].append({"name": "s", "secret": {"secretName": "t"}}),
        "only the prefetch job sees the hub token",
    ),
    "online": (lambda j: _env(j, "HF_HUB_OFFLINE", "0"), "HF_HUB_OFFLINE: found '0'"),
}  # fmt: skip


@pytest.mark.parametrize("what", STUDENT)
def test_a_broken_student(student: RenderedJob, what: str) -> None:
    documents = copy.deepcopy(student.documents)
    assert document_mistakes(documents) == []
    job = find(documents, "PyTorchJob")
    assert job is not None
    change, wanted = STUDENT[what]
    change(job)
    found = document_mistakes(documents)
    assert any(wanted in line for line in found), found


def test_a_teacher_with_elastic_policy_or_master(teacher: RenderedJob) -> None:
    job = copy.deepcopy(teacher.job)
    assert job_mistakes(job) == []
    annotations = {"sagemaker.amazonaws.com/enable-job-auto-resume": "true"}
    job["metadata"]["annotations"] = annotations
    assert "a resume stops all" in " ".join(job_mistakes(job))
    job["spec"]["elasticPolicy"] = {"minReplicas": 8, "maxReplicas": 8}
    assert "as soon as one worker has no shard left" in " ".join(job_mistakes(job))
    del job["spec"]["elasticPolicy"]
    job["spec"]["pytorchReplicaSpecs"]["Master"] = {**_worker(job), "replicas": 1}
    assert "expected Workers only" in " ".join(job_mistakes(job))


def test_a_worker_of_some_of_a_nodes_gpus_has_their_share_of_its_memory(
    teacher: RenderedJob,
) -> None:
    """It would fit alone; eight of them would not."""
    job = copy.deepcopy(teacher.job)
    assert _container(job)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod_mistakes(job) == []
    _resources(job, "memory", "300Gi")
    assert any("memory: found 300Gi, expected at most" in line for line in pod_mistakes(job))
    _resources(job, "memory", "100Gi")
    _container(job)["resources"]["requests"]["cpu"] = "40"
    assert any("cpu: found 40, expected at most" in line for line in pod_mistakes(job))


def test_all_mistakes_come_at_once(student: RenderedJob) -> None:
    documents = copy.deepcopy(student.documents)
    job = find(documents, "PyTorchJob")
    assert job is not None
    job["spec"]["elasticPolicy"]["maxRestarts"] = 3
    _container(job)["image"] = "distill-student:1"
    _env(job, "HF_TOKEN", "x")
    assert len(document_mistakes(documents)) >= 3


def test_a_kind_that_no_checker_knows() -> None:
    found = schema_mistakes({"apiVersion": "a.b/v1", "kind": "Odd", "metadata": {"name": "x"}})
    assert found == ["Odd/x: apiVersion a.b/v1: no checker knows this kind"]


def test_the_sample_would_not_pass() -> None:
    """The public sample's shape: range of nodes, autoscaler, hostPath, token in the command."""
    container = {
        "name": "pytorch", "image": "111122223333.dkr.ecr.us-west-2.amazonaws.com/distill:latest",
        "command": ["/bin/bash", "-c", "huggingface-cli login --token hf_" + "b2" * 17],
        "volumeMounts": [{"name": "shmem", "mountPath": "/dev/shm"}],
        "resources": {"limits": {"nvidia.com/gpu": "8"}, "requests": {"nvidia.com/gpu": "8"}},
    }  # fmt: skip
    volumes = [{"name": "shmem", "hostPath": {"path": "/dev/shm"}}]
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "distill", "labels": {"distill/stage": "train-student"}},
        "spec": {
            "runPolicy": {},
            "elasticPolicy": {
                "rdzvBackend": "c10d", "minReplicas": 1, "maxReplicas": 64, "maxRestarts": 100,
                "metrics": [{"type": "Resource", "resource": {
                    "name": "cpu", "target": {"type": "Utilization", "averageUtilization": 90},
                }}],
            },
            "pytorchReplicaSpecs": {"Worker": {
                "replicas": 2, "restartPolicy": "OnFailure",
                "template": {"spec": {"containers": [container], "volumes": volumes}},
            }},
        },
    }  # fmt: skip
    found = " ".join(document_mistakes([job]))
    for wanted in ("autoscaler", "maxReplicas 64", "torchrun", "looks like a token", "latest"):
        assert wanted in found


@pytest.mark.parametrize(
    "text",
    [
        "machine huggingface.co login me password hunter2", "machine a password b",
        "aws_secret_access_key = " + "wJalrXUtnFEMI/K7MDENG" * 2, "AWS_SESSION_TOKEN: '" + "x" * 40,
        '{"auths": {"a": {"auth": "dXNlcjpwYXNzd29yZA=="}}}', "https://me:secret@hub.example/x",
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_is_not_uploaded(text: str) -> None:
    config_map = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"},
        "data": {"config.yaml": text},
    }  # fmt: skip
    assert any("looks like a token" in line for line in document_mistakes([config_map]))
