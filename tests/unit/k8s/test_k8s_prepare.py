"""The preparation of the corpus on a cluster: stage one's own pod and configuration, on CPUs."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.__main__ import main
from k8s.checks.validate import document_mistakes
from k8s.cluster.instances import INSTANCES
from k8s.cluster.objects import Object, find, main_container, pod_spec
from k8s.rendering.manifests import EXAMPLE_IMAGES
from k8s.rendering.prepare import prepare_corpus_job
from k8s.rendering.render import RenderedJob, render_job
from pipeline.errors import ConfigError

OVERLAYS = ("local-kind", "hyperpod")


def _teacher(overlay: str = "hyperpod", **more: Any) -> RenderedJob:
    if overlay != "local-kind":
        more.setdefault("image", EXAMPLE_IMAGES["cache-teacher"])
    return render_job(stage="cache-teacher", run=more.pop("run", "exp1"), overlay=overlay, **more)


def _prepare(
    overlay: str = "hyperpod", workers: int = 3, node_selector: str | None = None, **more: Any
) -> RenderedJob:
    return prepare_corpus_job(
        _teacher(overlay, **more), workers=workers, node_selector=node_selector
    )


def _variables(job: Object) -> dict[str, Any]:
    return {item["name"]: item.get("value") for item in main_container(job)["env"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_it_is_the_teachers_pod_without_devices(overlay: str) -> None:
    flags = ["--num_samples", "7", "--corpus.prepared", "shared/corpus"]
    teacher = _teacher(overlay, flags=flags)
    rendered = prepare_corpus_job(teacher, workers=3)
    assert document_mistakes(rendered.documents) == []
    assert [item["kind"] for item in rendered.documents].count("Job") == 1
    assert find(rendered.documents, "PyTorchJob") is None
    job, pod, other = rendered.job, pod_spec(rendered.job), pod_spec(teacher.job)
    # One ConfigMap: what the workers read is what the teacher would read.
    config = find(rendered.documents, "ConfigMap")
    assert config == find(teacher.documents, "ConfigMap")
    assert rendered.settings == teacher.settings
    assert config is not None
    data = yaml.safe_load(config["data"]["config.yaml"])["corpus"]
    assert (data["num_samples"], data["prepared"]) == (7, "/fsx/shared/corpus")
    for field in (
        "serviceAccountName", "automountServiceAccountToken", "securityContext", "tolerations",
    ):  # fmt: skip
        assert pod.get(field) == other.get(field)
    ours, theirs = main_container(job), main_container(teacher.job)
    for field in ("image", "workingDir", "volumeMounts", "securityContext"):
        assert ours[field] == theirs[field]
    assert _variables(job) == _variables(teacher.job)
    assert ours["command"] == ["python", "-m", "stages.prepare_corpus"]
    assert ours["args"][:-1] == theirs["args"]
    names = {volume["name"]: volume for volume in other["volumes"]}
    for volume in pod["volumes"]:
        assert "emptyDir" in volume or volume == names[volume["name"]]
    text = json.dumps(job)
    for word in ("nvidia.com", "vpc.amazonaws.com/efa", "kubeflow", "enable-job-auto-resume"):
        assert word not in text
    # The images are built for it, and small nodes may be of another.
    assert pod["nodeSelector"] == {"kubernetes.io/arch": "amd64"}


def test_workers_are_the_indexes_of_one_job() -> None:
    spec = _prepare(workers=5).job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 5, 5)
    assert spec["backoffLimit"] == 30
    # A failure policy is accepted only for pods that are not restarted in place.
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    final, ignored = spec["podFailurePolicy"]["rules"]
    assert (final["action"], final["onExitCodes"]["values"]) == ("FailJob", [2, 3, 4])
    assert ignored["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (index,) = (
        item["valueFrom"]["fieldRef"]["fieldPath"]
        for item in spec["template"]["spec"]["containers"][0]["env"]
        if item["name"] == "DISTILL_REPLICA_INDEX"
    )
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@pytest.mark.parametrize(
    ("overlay", "flags", "processes"),
    [("hyperpod", [], 7), ("local-kind", [], 1),
     ("hyperpod", ["--corpus.processes", "30"], 30)],
)  # fmt: skip
def test_a_process_has_a_cpu_and_memory(overlay: str, flags: list[str], processes: int) -> None:
    container = main_container(_prepare(overlay, flags=flags).job)
    memory = f"{2 + processes}Gi"
    requests, limits = (container["resources"][part] for part in ("requests", "limits"))
    assert (requests["cpu"], requests["memory"]) == (str(processes), memory)
    assert limits["memory"] == memory
    assert container["args"][-1] == f"--corpus.processes={processes}"


def test_nodes_are_those_without_gpus_or_those_named() -> None:
    pod = pod_spec(_prepare().job)
    node = pod["affinity"]["nodeAffinity"]
    (preferred,) = node["preferredDuringSchedulingIgnoredDuringExecution"]
    (expression,) = preferred["preference"]["matchExpressions"]
    assert (expression["operator"], expression["values"]) == ("NotIn", list(INSTANCES))
    health = "sagemaker.amazonaws.com/node-health-status"
    assert health in json.dumps(node["requiredDuringSchedulingIgnoredDuringExecution"])
    pod = pod_spec(
        _prepare(node_selector="node.kubernetes.io/instance-type=ml.m5.4xlarge, pool=cpu").job
    )
    assert pod["nodeSelector"] == {
        "kubernetes.io/arch": "amd64", "node.kubernetes.io/instance-type": "ml.m5.4xlarge",
        "pool": "cpu",
    }  # fmt: skip


def test_the_name_identifies_the_content() -> None:
    first = _prepare()
    assert re.fullmatch(r"prepare-corpus-exp1-[0-9a-f]{8}", first.name)
    assert _prepare().documents == first.documents
    others = [
        _prepare(workers=4), _prepare(node_selector="pool=cpu"), _prepare(run="exp2"),
        _prepare(flags=["--num_samples", "7"]), _prepare("local-kind"),
    ]  # fmt: skip
    assert len({first.name, *(other.name for other in others)}) == 1 + len(others)


def test_the_queue_of_the_job_is_not_its_pods() -> None:
    job = _prepare(queue="cpu-queue", priority="low").job
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "cpu-queue"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "low"
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert labels == {"distill/stage": "prepare-corpus", "distill/run": "exp1"}


def test_the_pods_are_offline() -> None:
    """The network policy selects them, and a render that would go online is rejected."""
    documents = copy.deepcopy(_prepare().documents)
    policy = find(documents, "NetworkPolicy")
    assert policy is not None
    (selected,) = policy["spec"]["podSelector"]["matchExpressions"]
    assert "prepare-corpus" in selected["values"]
    job = find(documents, "Job")
    assert job is not None
    main_container(job)["env"].append({"name": "HF_HUB_OFFLINE", "value": "0"})
    assert any("HF_HUB_OFFLINE: found '0'" in line for line in document_mistakes(documents))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a corpus that is not on the volume": (
        {"flags": ["--corpus.prepared", "s3://bucket/corpus"]},
        r"corpus.prepared: found s3://bucket/corpus, expected a path on the volume",
    ),
    "a long name": ({"run": "a" * 27}, r"at most 26"),
    "no node selector": ({"node_selector": "ml.m5.4xlarge"}, r"found 'ml.m5.4xlarge'; expected la"),
    "half a node selector": ({"node_selector": "a=b,"}, r"node_selector: found ''"),
    "a flag of the other stage": ({"flags": ["--student_model", "x"]}, r"unknown flag"),
    "a value that does not fit": ({"flags": ["--corpus.unit_mib", "0"]}, r"unit_mib: found 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    arguments, match = BAD[what]
    with pytest.raises(ConfigError) as caught:
        _prepare(**arguments)
    assert re.search(match, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [(["--workers", "0"], "workers: found 0"), (["--nodes", "2"], "--nodes: unknown flag"),
     (["--cache_identity", "0123456789ab"], "--cache_identity: unknown flag")],
)  # fmt: skip
def test_bad_options(arguments: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        main(["prepare-corpus", "--overlay", "local-kind", *arguments])


def test_a_dry_run_asks_no_cluster(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    arguments = ["--overlay", "local-kind", "--run", "exp1", "--workers", "4", "--dry-run"]
    assert main(["prepare-corpus", *arguments, "--", "--num_samples", "9"]) == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    job = find(documents, "Job")
    assert job is not None
    assert job["spec"]["parallelism"] == 4
    config = find(documents, "ConfigMap")
    assert config is not None
    assert yaml.safe_load(config["data"]["config.yaml"])["corpus"]["num_samples"] == 9
