"""OPERATOR=: a rendered PyTorchJob for HyperPod's own operator, or for Trainer v2.

Stage two becomes a HyperPodPyTorchJob or a TrainJob. Stage one becomes an Indexed Job for both: its
workers need no rendezvous, each is healed by itself, and these operators restart all together.
"""

from __future__ import annotations

import copy

from k8s.checks.job_rules import nproc_of
from k8s.cluster.objects import Object, main_container, pod_spec, replica_specs
from k8s.cluster.workloads import Operator
from k8s.rendering.indexed_job import RESTARTS_PER_WORKER, indexed_spec, number_by_index

__all__ = ["convert"]

_KEPT_S = 604800
_REPLICAS = "pods"
_AUTO_RESUME = "sagemaker.amazonaws.com/"


def convert(job: Object, operator: Operator) -> Object:
    """Return the job for another operator than the training operator.

    Args:
        job: the PyTorchJob of a run.
        operator: `hyperpod` or `trainer`.
    """
    job = copy.deepcopy(job)
    if "elasticPolicy" not in job["spec"]:
        return _indexed(job)
    return _hyperpod(job) if operator == "hyperpod" else _trainer(job)


def _metadata(job: Object) -> Object:
    """Name, namespace, labels and annotations, but for the other operator's auto-resume."""
    metadata = {key: job["metadata"][key] for key in ("name", "namespace", "labels")}
    template = replica_specs(job)["Worker"]["template"]["metadata"].get("annotations") or {}
    given = {**(job["metadata"].get("annotations") or {}), **template}
    annotations = {key: value for key, value in given.items() if not key.startswith(_AUTO_RESUME)}
    return {**metadata, **({"annotations": annotations} if annotations else {})}


def _indexed(job: Object) -> Object:
    worker = replica_specs(job)["Worker"]
    template = worker["template"]
    template["spec"]["restartPolicy"] = "Never"
    number_by_index(main_container(job))
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job),
        "spec": {**indexed_spec(worker["replicas"]), "template": template},
    }


def _hyperpod(job: Object) -> Object:
    """Return a HyperPodPyTorchJob; its image needs the package hyperpod-elastic-agent."""
    worker, container = replica_specs(job)["Worker"], main_container(job)
    _, *words = container["command"]
    for field in ("fsGroup", "fsGroupChangePolicy"):
        # Unknown to its model; the FSx driver ignores them.
        pod_spec(job).get("securityContext", {}).pop(field, None)
    container["command"] = ["hyperpodrun", f"--nnodes={worker['replicas']}", *words]
    return {
        "apiVersion": "sagemaker.amazonaws.com/v1",
        "kind": "HyperPodPyTorchJob",
        "metadata": _metadata(job),
        "spec": {
            "nprocPerNode": str(nproc_of(container)),
            "runPolicy": {
                "cleanPodPolicy": "None",
                "jobMaxRetryCount": RESTARTS_PER_WORKER,
                "ttlSecondsAfterFinished": _KEPT_S,
            },
            "replicaSpecs": [
                {
                    "name": _REPLICAS,
                    "replicas": worker["replicas"],
                    "template": worker["template"],
                }
            ],
        },
    }


def _trainer(job: Object) -> Object:
    """Return a TrainJob on the stock runtime `torch-distributed`; torchrun reads the same PET_*."""
    worker, container, spec = replica_specs(job)["Worker"], main_container(job), pod_spec(job)
    # What a TrainJob may change of the runtime's pods; the rest goes with its trainer.
    pod: Object = {
        name: spec[name]
        for name in (
            "serviceAccountName", "securityContext", "volumes", "nodeSelector", "affinity",
            "tolerations", "terminationGracePeriodSeconds",
        )
        if name in spec
    }  # fmt: skip
    own = {key: container[key] for key in ("securityContext", "volumeMounts") if key in container}
    pod["containers"] = [{"name": "node", **own}]
    template: Object = {"metadata": worker["template"]["metadata"], "spec": pod}
    replicated = {"name": "node", "template": {"spec": {"template": template}}}
    patch = {"template": {"spec": {"replicatedJobs": [replicated]}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(job),
        "spec": {
            "runtimeRef": {"name": "torch-distributed", "kind": "ClusterTrainingRuntime"},
            "trainer": {
                "image": container["image"],
                "command": container["command"],
                "args": container["args"],
                "env": container["env"],
                "numNodes": worker["replicas"],
                "numProcPerNode": nproc_of(container),
                "resourcesPerNode": container["resources"],
            },
            "runtimePatches": [{"manager": "offline-distill/render", "trainingRuntimeSpec": patch}],
        },
    }
