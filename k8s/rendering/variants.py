"""The student's job in two other forms: a Katib Experiment's trial, and a Trainer v2 TrainJob.

Examples, not the default: Katib needs its controller, database and webhooks; Trainer v2 is
still alpha. Both start the same container.
"""

from __future__ import annotations

import copy

from k8s.checks.job_rules import nproc_of
from k8s.cluster.objects import Object, find, main_container, pod_spec, replica_specs
from k8s.rendering.render import RenderedJob

__all__ = ["katib_experiment", "train_job", "trial_job"]

_SEARCHED = {"temperature": ("1.0", "2.0"), "alpha": ("0.25", "0.5", "0.75")}
_FIELD = {"temperature": "loss.temperature", "alpha": "loss.alpha"}


def katib_experiment(rendered: RenderedJob) -> list[Object]:
    """Return a grid over temperature and alpha; each trial is a job of its own output folder."""
    job = copy.deepcopy(rendered.job)
    container = main_container(job)
    container["args"] = [
        *container["args"],
        f"--output_dir={rendered.volume}/runs/{rendered.run}/katib/${{trialSpec.Name}}",
        *(f"--{_FIELD[name]}=${{trialParameters.{name}}}" for name in _SEARCHED),
    ]
    trial: Object = {
        "apiVersion": job["apiVersion"],
        "kind": job["kind"],
        "metadata": {
            name: job["metadata"][name] for name in ("annotations",) if name in job["metadata"]
        },
        "spec": job["spec"],
    }
    experiment: Object = {
        "apiVersion": "kubeflow.org/v1beta1",
        "kind": "Experiment",
        "metadata": {"name": f"student-{rendered.run}", "namespace": rendered.namespace},
        "spec": {
            "objective": {"type": "minimize", "objectiveMetricName": "loss"},
            "algorithm": {"algorithmName": "grid"},
            "parallelTrialCount": 2,
            "maxTrialCount": 6,
            "maxFailedTrialCount": 2,
            # Reads the progress lines of rank 0: `..., loss=1.2345`.
            "metricsCollectorSpec": {
                "collector": {"kind": "StdOut"},
                "source": {"filter": {"metricsFormat": [r"(loss)=([+-]?\d+\.\d+)"]}},
            },
            "parameters": [
                {
                    "name": name,
                    "parameterType": "categorical",
                    "feasibleSpace": {"list": list(values)},
                }
                for name, values in _SEARCHED.items()
            ],
            "trialTemplate": {
                "primaryContainerName": "pytorch",
                # Worker-0 of a Worker-only job carries this label; Katib's default asks for it too.
                "primaryPodLabels": {"training.kubeflow.org/job-role": "master"},
                "successCondition": 'status.conditions.#(type=="Succeeded")#|#(status=="True")#',
                "failureCondition": 'status.conditions.#(type=="Failed")#|#(status=="True")#',
                "retain": True,
                "trialParameters": [
                    {"name": name, "description": _FIELD[name], "reference": name}
                    for name in _SEARCHED
                ],
                "trialSpec": trial,
            },
        },
    }
    return [*_support(rendered), experiment]


def trial_job(experiment: Object, *, name: str, values: dict[str, str]) -> Object:
    """Return the job that Katib would make of one trial, for the checks."""

    def fill(value: object) -> object:
        if isinstance(value, str):
            value = value.replace("${trialSpec.Name}", name)
            for key, text in values.items():
                value = value.replace(f"${{trialParameters.{key}}}", text)
        elif isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        elif isinstance(value, list):
            return [fill(item) for item in value]
        return value

    job = fill(copy.deepcopy(experiment["spec"]["trialTemplate"]["trialSpec"]))
    assert isinstance(job, dict)
    job["metadata"] |= {
        "name": name,
        "namespace": experiment["metadata"]["namespace"],
        "labels": {"distill/stage": "train-student"},
    }
    return job


def train_job(rendered: RenderedJob) -> list[Object]:
    """Return a TrainJob on the stock runtime `torch-distributed`; torchrun reads the same PET_*."""
    container = main_container(rendered.job)
    spec = pod_spec(rendered.job)
    patch: Object = {
        name: copy.deepcopy(spec[name])
        for name in (
            "serviceAccountName", "securityContext", "volumes", "nodeSelector", "affinity",
            "tolerations", "terminationGracePeriodSeconds",
        )
        if name in spec
    }  # fmt: skip
    patch["containers"] = [
        {
            "name": "node",
            "volumeMounts": container["volumeMounts"],
            **{key: container[key] for key in ("securityContext",) if key in container},
        }
    ]
    job: Object = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {
            "name": rendered.name,
            "namespace": rendered.namespace,
            "labels": dict(rendered.job["metadata"]["labels"]),
        },
        "spec": {
            "runtimeRef": {"name": "torch-distributed", "kind": "ClusterTrainingRuntime"},
            "trainer": {
                "image": container["image"],
                "command": container["command"],
                "args": container["args"],
                "env": container["env"],
                "numNodes": replica_specs(rendered.job)["Worker"]["replicas"],
                "numProcPerNode": nproc_of(container),
                "resourcesPerNode": container["resources"],
            },
            "runtimePatches": [
                {
                    "manager": "offline-distill/render",
                    "trainingRuntimeSpec": {
                        "template": {
                            "spec": {
                                "replicatedJobs": [
                                    {
                                        "name": "node",
                                        "template": {"spec": {"template": {"spec": patch}}},
                                    }
                                ]
                            }
                        }
                    },
                }
            ],
        },
    }
    return [*_support(rendered), job]


def _support(rendered: RenderedJob) -> list[Object]:
    """ConfigMap and account that the job names."""
    found = [find(rendered.documents, kind) for kind in ("ServiceAccount", "ConfigMap")]
    return [item for item in found if item is not None]
