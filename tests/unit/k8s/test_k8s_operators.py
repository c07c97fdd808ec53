"""One run for three operators, each checked strictly against models that its package carries."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from k8s.checks.schema import HYPERPOD_MODELS, schema_mistakes
from k8s.checks.validate import document_mistakes
from k8s.cluster.objects import Object, find, main_container, pod_spec
from k8s.cluster.workloads import selector
from k8s.rendering.manifests import EXAMPLE_IMAGES
from k8s.rendering.render import RenderedJob, render_job
from k8s.submission.job_state import job_state
from k8s.submission.status import _workers
from pipeline.errors import FINAL_EXIT_CODES


def _render(stage: Any, operator: Any, **more: Any) -> RenderedJob:
    return render_job(
        stage=stage, run="exp1", overlay="hyperpod", image=EXAMPLE_IMAGES[stage],
        operator=operator, **more,
    )  # fmt: skip


def test_the_models_are_there() -> None:
    """Without them the strict checks below would show nothing."""
    assert HYPERPOD_MODELS.exists(), "run `make hyperpod-models`"


def test_the_training_operator_is_the_default() -> None:
    rendered = render_job(stage="train-student", run="r", overlay="local-kind")
    assert rendered.submitted is rendered.job
    assert rendered.objects == rendered.documents
    assert rendered.job["kind"] == "PyTorchJob"


@pytest.mark.parametrize(
    ("operator", "kind"), [("hyperpod", "HyperPodPyTorchJob"), ("trainer", "TrainJob")]
)
def test_stage_two_for_another_operator(operator: str, kind: str) -> None:
    default = _render("train-student", "kubeflow", nodes=3, queue="q")
    rendered = _render("train-student", operator, nodes=3, queue="q")
    kinds = [item["kind"] for item in rendered.objects]
    assert kinds.count(kind) == 1
    assert "PyTorchJob" not in kinds
    assert document_mistakes(rendered.objects) == []
    job = rendered.submitted
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    # Each operator resumes in its own way.
    assert "auto-resume" not in str(job)
    assert "enable-job-auto-resume" in str(default.job)
    if operator == "hyperpod":
        assert job["spec"]["replicaSpecs"][0]["replicas"] == 3
        assert job["spec"]["nprocPerNode"] == "8"
        command = main_container(job)["command"]
        assert command[:3] == ["hyperpodrun", "--nnodes=3", "--nproc-per-node=8"]
        assert command[2:] == main_container(default.job)["command"][1:]
        assert selector(job) == f"HPJob={rendered.name}"
    else:
        trainer = job["spec"]["trainer"]
        assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 8)
        assert trainer["env"] == main_container(default.job)["env"]


@pytest.mark.parametrize("operator", ["hyperpod", "trainer"])
def test_stage_one_needs_no_operator(operator: str) -> None:
    """Its workers heal one by one; both of these restart all of them."""
    rendered = _render("cache-teacher", operator, nodes=2)
    job = rendered.submitted
    assert (job["kind"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Job", 16, 16)
    assert pod_spec(job)["restartPolicy"] == "Never"
    fail, ignore = job["spec"]["podFailurePolicy"]["rules"]
    assert fail["onExitCodes"]["values"] == list(FINAL_EXIT_CODES)
    assert ignore["action"] == "Ignore"
    (index,) = (v for v in main_container(job)["env"] if v["name"] == "DISTILL_REPLICA_INDEX")
    assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]
    assert find(rendered.objects, "ConfigMap") is not None
    assert document_mistakes(rendered.objects) == []


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda j: j["spec"].update(elastic={}), "spec.elastic: unknown field"),
        (lambda j: j["spec"]["runPolicy"].update(backoffLimit=1), "spec.runPolicy.backoffLimit: "),
        (lambda j: pod_spec(j).update(volume=[]), "template.spec.volume: "),
        (lambda j: j["spec"].update(nprocPerNode=8), "spec.nprocPerNode: "),
        (lambda j: j.update(apiVersion="sagemaker.amazonaws.com/v2"), "expected sagemaker."),
        (lambda j: main_container(j)["env"][0].update(values="x"), "values: "),
    ],
)
def test_a_field_that_hyperpods_operator_does_not_know(change: Any, wanted: str) -> None:
    job: Object = copy.deepcopy(_render("train-student", "hyperpod").submitted)
    assert schema_mistakes(job) == []
    change(job)
    assert any(wanted in line for line in schema_mistakes(job)), schema_mistakes(job)


def test_the_network_level_is_asked_for_by_choice() -> None:
    key = "kueue.x-k8s.io/podset-preferred-topology"
    for operator in ("kubeflow", "hyperpod", "trainer"):
        level = "topology.k8s.aws/network-node-layer-3"
        assert f"'{key}': '{level}'" in str(
            _render("train-student", operator, topology=level).objects
        )
        assert key not in str(_render("train-student", operator).objects)


def test_the_list_counts_the_workers_of_every_kind() -> None:
    for operator in ("kubeflow", "hyperpod", "trainer"):
        assert _workers(_render("train-student", operator, nodes=3).submitted) == 3
    assert _workers(_render("cache-teacher", "trainer", nodes=3).submitted) == 24


@pytest.mark.parametrize(
    ("status", "phase"),
    [
        ({"conditions": [{"type": "Completed", "status": "True"}]}, "succeeded"),
        ({"conditions": [{"type": "Complete", "status": "True"}]}, "succeeded"),
        ({"conditions": [{"type": "Failed", "status": "True"}]}, "failed"),
        ({"jobsStatus": [{"name": "node", "active": 1}]}, "running"),
        ({}, "waiting"),
    ],
)
def test_states_of_all_operators(status: Object, phase: str) -> None:
    assert job_state({"status": status}).phase == phase
