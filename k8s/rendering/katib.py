"""The student's job as the trial of a Katib Experiment: an example, not the default.

Katib needs its controller, database and webhooks.
"""

from __future__ import annotations

import copy

from k8s.cluster.objects import Object, find, main_container
from k8s.rendering.render import RenderedJob

__all__ = ["katib_experiment", "trial_job"]

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


def _support(rendered: RenderedJob) -> list[Object]:
    """ConfigMap and account that the job names."""
    found = [find(rendered.documents, kind) for kind in ("ServiceAccount", "ConfigMap")]
    return [item for item in found if item is not None]
