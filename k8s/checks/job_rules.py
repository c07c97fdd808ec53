"""Rules for the jobs: what the operator requires beyond its schema, and each stage's shape."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from k8s.cluster.instances import quantity
from k8s.cluster.objects import Object, main_container, pod_spec, replica_specs
from pipeline.errors import ConfigError
from pipeline.student.engine.launch import SHUTDOWN_VARIABLE

__all__ = ["GPU", "LONGEST_NAME", "gpus_of", "instance_type", "job_mistakes", "nproc_of"]

LONGEST_NAME = 50
"""Pods and services are called `<job>-worker-<i>`, and a name ends at 63 characters."""

GPU = "nvidia.com/gpu"
_INSTANCE = "node.kubernetes.io/instance-type"
_HEALTH = "sagemaker.amazonaws.com/node-health-status"
_RESUME = "sagemaker.amazonaws.com/enable-job-auto-resume"
_RETRIES = "sagemaker.amazonaws.com/job-max-retry-count"
# Fields of the current models that the operator of August 2023 (HyperPod's chart) lacks.
_TOO_NEW = (
    (r"spec\.runPolicy\.managedBy", "managedBy"),
    (r".*\.initContainers\.\d+\.restartPolicy", "native sidecars"),
    (r".*\.lifecycle\.preStop\.sleep", "preStop.sleep"),
    (r".*\.appArmorProfile", "appArmorProfile"),
    (r".*\.supplementalGroupsPolicy", "supplementalGroupsPolicy"),
    (r".*\.volumes\.\d+\.image", "image volumes"),
    (r".*\.(mis)?matchLabelKeys", "matchLabelKeys"),
)


def instance_type(item: Object) -> str | None:
    """Return the node type that a workload selects, None where it selects none."""
    selected = (pod_spec(item).get("nodeSelector") or {}).get(_INSTANCE)
    return str(selected) if selected else None


def gpus_of(container: dict[str, Any]) -> int:
    """Return the GPUs a container asks for."""
    limits = (container.get("resources") or {}).get("limits") or {}
    count = quantity(limits.get(GPU, 0))
    return int(count) if count == count else 0


def nproc_of(container: dict[str, Any]) -> int | None:
    """Return torchrun's --nproc-per-node, None where it is not a number given on the command."""
    text = _flag_of(container, "--nproc-per-node")
    return int(text) if text is not None and text.isdigit() else None


def _shutdown_timeout(container: dict[str, Any]) -> int | None:
    """Return the seconds after which torchrun kills its processes, None where it has its own."""
    named = {item.get("name"): item.get("value") for item in container.get("env") or []}
    text = _flag_of(container, "--shutdown-timeout") or named.get(SHUTDOWN_VARIABLE)
    return int(text) if text is not None and str(text).isdigit() else None


def _flag_of(container: dict[str, Any], flag: str) -> str | None:
    """Return the value of a flag of the command, None where it is not on it."""
    words = [str(word) for word in [*container.get("command", []), *container.get("args", [])]]
    for index, word in enumerate(words):
        name, has_value, value = word.partition("=")
        if name.replace("_", "-") == flag:
            return value if has_value else " ".join(words[index + 1 : index + 2])
    return None


def job_mistakes(job: Object) -> list[str]:
    """Return what is wrong with a PyTorchJob, one line each: found, expected."""
    name = f"PyTorchJob/{job['metadata'].get('name')}"
    found = [*_operator_rules(job), *_too_new(job)]
    try:
        match (job["metadata"].get("labels") or {}).get("distill/stage"):
            case "cache-teacher":
                found += _teacher_shape(job)
            case "train-student":
                found += _student_shape(job)
        if (instance_type(job) or "").startswith("ml."):
            found += _hyperpod_rules(job)
    except ConfigError as error:
        found.append(str(error))
    return [line if line.startswith(name) else f"{name}: {line}" for line in found]


def _operator_rules(job: Object) -> Iterator[str]:
    name = str(job["metadata"].get("name", ""))
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > LONGEST_NAME:
        yield (
            f"metadata.name: found {name!r}, expected lower-case letters, digits and dashes, a "
            f"letter first, at most {LONGEST_NAME}"
        )
    spec, specs = job.get("spec") or {}, replica_specs(job)
    if "Master" in specs:
        yield "Master: found one, expected Workers only (it brings an unrestricted init container)"
    if "Worker" in specs:
        count, policy = specs["Worker"].get("replicas"), specs["Worker"].get("restartPolicy")
        if not isinstance(count, int) or count < 1:
            yield f"Worker.replicas: found {count!r}, expected at least 1"
        if policy not in ("Always", "OnFailure", "Never", "ExitCode"):
            yield f"Worker.restartPolicy: found {policy!r}, expected OnFailure"
        try:
            main_container(job)
        except ConfigError as error:
            yield str(error)
    if not specs:
        yield "spec.pytorchReplicaSpecs: found nothing, expected a Worker"
    elastic = spec.get("elasticPolicy")
    if elastic is not None and "Worker" not in specs:
        yield "spec.elasticPolicy: found without a Worker, expected both"
    if elastic is not None and "nProcPerNode" in elastic and "nprocPerNode" in spec:
        yield "nprocPerNode: found in spec and in elasticPolicy, expected one of them"
    clean = (spec.get("runPolicy") or {}).get("cleanPodPolicy")
    if clean not in (None, "None", "Running", "All"):
        yield f"runPolicy.cleanPodPolicy: found {clean!r}, expected None, Running or All"


def _too_new(job: Object) -> Iterator[str]:
    for path in _paths(job):
        for pattern, what in _TOO_NEW:
            if re.fullmatch(pattern, path):
                yield (
                    f"{path}: found {what}, which the operator that HyperPod installs does not "
                    "know; expected a field of training-operator 1.7"
                )


def _paths(value: Any, path: str = "") -> Iterator[str]:
    if path:
        yield path
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield from _paths(item, f"{path}.{key}" if path else str(key))


def _teacher_shape(job: Object) -> Iterator[str]:
    if job["spec"].get("elasticPolicy") is not None:
        yield (
            "spec.elasticPolicy: found one, expected none: with it the job counts as done as soon "
            "as one worker has no shard left"
        )


def _student_shape(job: Object) -> Iterator[str]:
    elastic = job["spec"].get("elasticPolicy")
    workers = replica_specs(job).get("Worker", {}).get("replicas")
    if elastic is None:
        yield "spec.elasticPolicy: found none, expected c10d: without it each worker trains alone"
        return
    sizes = (elastic.get("minReplicas"), elastic.get("maxReplicas"))
    if sizes != (workers, workers):
        yield (
            f"elasticPolicy: found minReplicas {sizes[0]} and maxReplicas {sizes[1]}, expected "
            f"both to equal Worker.replicas ({workers})"
        )
    for field, want in (("rdzvBackend", "c10d"), ("maxRestarts", 0)):
        if elastic.get(field) != want:
            yield f"elasticPolicy.{field}: found {elastic.get(field)!r}, expected {want!r}"
    if elastic.get("metrics"):
        yield "elasticPolicy.metrics: found some, expected none: they make an autoscaler over GPUs"
    container = main_container(job)
    command = [*container.get("command", []), *container.get("args", [])]
    if not command or str(command[0]).rsplit("/", 1)[-1] != "torchrun":
        yield f"command: found {' '.join(map(str, command[:2]))!r}, expected torchrun"
    nproc, gpus = nproc_of(container), gpus_of(container)
    if nproc is None:
        yield (
            "command: found no --nproc-per-node=NUMBER, expected one (only the newer operator "
            "gives torchrun a default)"
        )
    elif gpus and nproc != gpus:
        yield f"--nproc-per-node: found {nproc}, expected the container's GPUs ({gpus})"
    grace = pod_spec(job).get("terminationGracePeriodSeconds", 30)
    timeout = _shutdown_timeout(container)
    if timeout is None or not timeout < grace:
        found = "none (torchrun's is 30)" if timeout is None else f"{timeout:g}"
        yield (
            f"{SHUTDOWN_VARIABLE}: found {found}, expected seconds below the pod's "
            f"terminationGracePeriodSeconds ({grace}): then torchrun kills its processes, whether "
            "their checkpoint is written or not"
        )


def _hyperpod_rules(job: Object) -> Iterator[str]:
    annotations = job["metadata"].get("annotations") or {}
    if "elasticPolicy" not in job["spec"]:
        if annotations.get(_RESUME) == "true":
            yield (
                f"metadata.annotations: found {_RESUME}, expected none for stage one: leases heal "
                "a lost worker, a resume stops all"
            )
    elif annotations.get(_RESUME) != "true" or not str(annotations.get(_RETRIES, "")).isdigit():
        yield f'metadata.annotations: expected {_RESUME}: "true" and a number in {_RETRIES}'
    namespace = str(job["metadata"].get("namespace"))
    if namespace != "kubeflow" and not namespace.startswith("hyperpod"):
        yield (
            f"metadata.namespace: found {namespace!r}, expected kubeflow or one that starts with "
            "hyperpod (auto-resume works in those)"
        )
    if replica_specs(job)["Worker"].get("restartPolicy") != "OnFailure":
        yield "Worker.restartPolicy: expected OnFailure (auto-resume requires it)"
    spec = pod_spec(job)
    if not any(item.get("key") == _HEALTH for item in spec.get("tolerations") or []):
        yield f"tolerations: expected one for {_HEALTH}"
    if _HEALTH not in str((spec.get("affinity") or {}).get("nodeAffinity")):
        yield f"affinity: expected node affinity to {_HEALTH}"
