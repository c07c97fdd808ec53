"""How many workers a run has, and which share of a node each takes."""

from __future__ import annotations

from typing import Any

from k8s.checks.job_rules import GPU, gpus_of, instance_type
from k8s.cluster.instances import INSTANCES, Instance, quantity
from k8s.cluster.objects import Object, main_container, pod_spec, replica_specs
from k8s.cluster.workloads import Operator
from k8s.rendering.indexed_job import RESTARTS_PER_WORKER
from pipeline.api.settings import TeacherRun
from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.teacher.settings import TeacherSettings
from stages.teacher_group import GROUP_NODES

__all__ = ["set_size"]


def set_size(
    job: Object, nodes: int | None, settings: Settings, *, in_queue: str | None, operator: Operator
) -> None:
    """Set the number of workers in every field that has it, and each one's share of a node.

    A teacher's worker is an engine, of the GPUs that share one. Where these are more than a node
    has, a worker is a node, and several of them are an engine.

    Raises:
        ConfigError: engines do not fit the nodes.
    """
    worker = replica_specs(job)["Worker"]
    gpus = gpus_of(main_container(job))
    node = INSTANCES.get(instance_type(job) or "")
    if nodes is not None and nodes < 1:
        raise ConfigError(f"nodes: found {nodes}", expected="1 or more", do="give another NODES=")
    if isinstance(settings, TeacherRun) and gpus and node is not None:
        if settings.teacher.devices > node.gpus:
            group = _group_nodes(settings.teacher, node, str(instance_type(job)))
            there = nodes or group
            _check_groups(there, group, in_queue=in_queue, operator=operator)
            _set_share(job, node.gpus, gpus)
            _join(job, group)
            worker["replicas"] = there
        else:
            _check_engine(settings.teacher, node, str(instance_type(job)))
            wanted = settings.worker_gpus
            if node.gpus % wanted:
                raise ConfigError(
                    f"generate.writer_parallel_size: found {wanted}",
                    expected=f"a divisor of the {node.gpus} GPUs that {instance_type(job)} has",
                )
            there = nodes or max(1, int(worker.get("replicas", 1)) * gpus // node.gpus)
            _set_share(job, wanted, gpus)
            worker["replicas"] = there * (node.gpus // wanted)
    elif nodes is not None:
        worker["replicas"] = nodes
    replicas = int(worker.get("replicas", 1))
    elastic = job["spec"].get("elasticPolicy")
    if elastic is not None and nodes is not None:
        elastic["minReplicas"] = elastic["maxReplicas"] = replicas
    # The operator adds up the restarts of all workers.
    policy = job["spec"].setdefault("runPolicy", {})
    policy["backoffLimit"] = max(int(policy.get("backoffLimit", 0)), RESTARTS_PER_WORKER * replicas)


def _check_engine(teacher: TeacherSettings, node: Instance, kind: str) -> None:
    if node.gpus % teacher.devices:
        stages = teacher.devices != teacher.tensor_parallel_size
        raise ConfigError(
            f"teacher.tensor_parallel_size: found {teacher.tensor_parallel_size}"
            + (f", {teacher.devices} GPUs with its pipeline's stages" if stages else ""),
            expected=f"a divisor of the {node.gpus} GPUs that {kind} has",
            do="an engine must not leave GPUs of a node unused",
        )


def _group_nodes(teacher: TeacherSettings, node: Instance, kind: str) -> int:
    """Return the nodes of an engine that has more GPUs than one of them."""
    if node.gpus % teacher.tensor_parallel_size:
        raise ConfigError(
            f"teacher.tensor_parallel_size: found {teacher.tensor_parallel_size}",
            expected=f"a divisor of the {node.gpus} GPUs that {kind} has: the sums of a layer go "
            "over NVLink, and the teacher's image has no EFA",
            do="let the nodes be stages of a pipeline: --teacher.engine_options "
            "'{pipeline_parallel_size: 2, distributed_executor_backend: ray}'",
        )
    if teacher.engine_options.get("distributed_executor_backend") != "ray":
        raise ConfigError(
            f"a teacher of {teacher.devices} GPUs, more than the {node.gpus} of {kind}",
            expected="distributed_executor_backend: ray in teacher.engine_options, which reaches "
            "those of other nodes",
        )
    if teacher.devices % node.gpus:
        raise ConfigError(
            f"a teacher of {teacher.devices} GPUs",
            expected=f"whole nodes, a multiple of the {node.gpus} GPUs of {kind}",
            do="give another pipeline_parallel_size",
        )
    return teacher.devices // node.gpus


def _check_groups(nodes: int, group: int, *, in_queue: str | None, operator: Operator) -> None:
    if nodes % group:
        raise ConfigError(
            f"nodes: found {nodes}",
            expected=f"a multiple of {group}, the nodes of one teacher",
            do="give another NODES=",
        )
    if nodes > group and not in_queue:
        raise ConfigError(
            f"nodes: found {nodes}, {nodes // group} teachers of {group} nodes, without a queue",
            expected=f"{group}, or a queue, which admits all nodes together: half placed teachers "
            "would hold their nodes and wait for each other's",
            do=f"give QUEUE=, or NODES={group}",
        )
    if operator != "kubeflow":
        raise ConfigError(
            f"operator {operator}: given for a teacher of {group} nodes",
            expected="kubeflow: its pods are found by name, and stage one is an Indexed Job of "
            "Kubernetes with the others, whose pods have no names in DNS",
            do="leave OPERATOR= out",
        )


def _join(job: Object, group: int) -> None:
    """Let the workers of a job form groups, each one teacher (stages/teacher_group.py)."""
    container = main_container(job)
    container["command"] = ["python", "-m", "stages.teacher_group"]
    label = "metadata.labels['training.kubeflow.org/job-name']"
    container["env"] += [
        {"name": GROUP_NODES, "value": str(group)},
        {"name": "DISTILL_JOB", "valueFrom": {"fieldRef": {"fieldPath": label}}},
        {"name": "VLLM_HOST_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "NCCL_SOCKET_IFNAME", "value": "^lo,docker,veth"},
    ]


def _set_share(job: Object, wanted: int, before: int) -> None:
    """Give a worker `wanted` GPUs, and as much more of everything else than before."""
    container, spec, factor = main_container(job), pod_spec(job), wanted / before
    if factor == 1:
        return
    for part in ("requests", "limits"):
        amounts: dict[str, Any] = container["resources"][part]
        amounts[GPU] = str(wanted)
        if "cpu" in amounts:
            amounts["cpu"] = f"{round(quantity(amounts['cpu']) * factor * 1000)}m"
        if "memory" in amounts:
            amounts["memory"] = f"{round(quantity(amounts['memory']) * factor / 2**20)}Mi"
    for volume in spec.get("volumes") or []:
        directory = volume.get("emptyDir") or {}
        if directory.get("medium") == "Memory" and "sizeLimit" in directory:
            size = quantity(directory["sizeLimit"]) * factor / 2**20
            directory["sizeLimit"] = f"{round(size)}Mi"
