"""Rendering a run: names, sizes, paths on the volume, files carried along; and what is rejected."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.__main__ import main
from k8s.cluster.objects import ROOT, find, main_container, pod_spec, replica_specs
from k8s.rendering.manifests import EXAMPLE_IMAGES
from k8s.rendering.render import RenderedJob, render_job
from pipeline.api.settings import StudentRun, TeacherRun
from pipeline.errors import ConfigError, DistillError


def _render(stage: Any = "train-student", overlay: str = "local-kind", **more: Any) -> RenderedJob:
    if overlay.startswith("hyperpod"):
        more.setdefault("image", EXAMPLE_IMAGES[stage])
    return render_job(stage=stage, run=more.pop("run", "exp1"), overlay=overlay, **more)


def _config(rendered: RenderedJob) -> dict[str, Any]:
    found = find(rendered.documents, "ConfigMap")
    assert found is not None
    data: dict[str, Any] = yaml.safe_load(found["data"]["config.yaml"])
    return data


def _rejected(*, match: str, **more: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        _render(**more)
    assert re.search(match, str(caught.value)), str(caught.value)


def test_a_run_is_one_job_with_its_configuration() -> None:
    rendered = _render(flags=["--temperature", "1"], labels={"distill/sweep": "grid"})
    kinds = [item["kind"] for item in rendered.documents]
    assert kinds.count("PyTorchJob") == kinds.count("ConfigMap") == 1
    assert re.fullmatch(r"train-student-exp1-[0-9a-f]{8}", rendered.name)
    config = find(rendered.documents, "ConfigMap")
    assert config is not None
    assert config["metadata"]["name"] == rendered.name
    (volume,) = (v for v in pod_spec(rendered.job)["volumes"] if v["name"] == "config")
    assert volume["configMap"]["name"] == rendered.name
    template = replica_specs(rendered.job)["Worker"]["template"]
    for holder in (rendered.job, template):
        assert holder["metadata"]["labels"]["distill/run"] == "exp1"
        assert holder["metadata"]["labels"]["distill/sweep"] == "grid"
    # What the pod reads is what was checked here.
    assert StudentRun.model_validate(_config(rendered)) == rendered.settings


def test_the_name_identifies_the_content() -> None:
    first, again = _render(), _render()
    assert (first.name, first.documents) == (again.name, again.documents)
    others = [
        _render(flags=["--temperature", "2"]), _render(nodes=3), _render(image="other:1"),
        _render(labels={"distill/sweep": "x"}), _render(run="exp2"),
    ]  # fmt: skip
    names = {first.name, *(other.name for other in others)}
    assert len(names) == 1 + len(others)


def test_a_sweep_is_one_job_per_point() -> None:
    points = [
        _render(
            run=f"grid-{index}", labels={"distill/sweep": "grid"}, queue="q", priority="p",
            flags=["--cache_dir", "/fsx/runs/base/cache", "--alpha", alpha],
        )
        for index, alpha in enumerate(("0.25", "0.5", "0.75"))
    ]  # fmt: skip
    assert {_config(point)["cache_dir"] for point in points} == {"/fsx/runs/base/cache"}
    assert len({_config(point)["output"]["output_dir"] for point in points}) == 3
    labels = points[0].job["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "q"
    assert labels["kueue.x-k8s.io/priority-class"] == "p"


def test_sizes_are_set_in_every_field() -> None:
    student = _render(overlay="hyperpod", nodes=4)
    elastic = student.job["spec"]["elasticPolicy"]
    assert (elastic["minReplicas"], elastic["maxReplicas"]) == (4, 4)
    assert replica_specs(student.job)["Worker"]["replicas"] == 4
    assert student.world_size == 32
    assert student.job["spec"]["runPolicy"]["backoffLimit"] == 24


@pytest.mark.parametrize(("parallel", "workers"), [(1, 16), (2, 8), (4, 4), (8, 2)])
def test_a_teacher_has_as_many_workers_as_engines_fit(parallel: int, workers: int) -> None:
    teacher = _render(
        "cache-teacher", "hyperpod", nodes=2, instance="p4d",
        flags=["--teacher.tensor_parallel_size", str(parallel)],
    )  # fmt: skip
    assert replica_specs(teacher.job)["Worker"]["replicas"] == workers
    resources = main_container(teacher.job)["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == str(parallel)
    whole = {"memory": 1008 * 2**30, "cpu": 88.0}
    from k8s.cluster.instances import quantity

    for name, amount in whole.items():
        assert quantity(resources["requests"][name]) * 8 / parallel == pytest.approx(amount)


@pytest.mark.parametrize(
    ("instance", "student", "teachers"),
    [
        ("p5en", ("8", "16", "1792Gi"), 16),
        ("ml.p6-b300.48xlarge", ("8", "16", "3584Gi"), 16),
        ("p5.4xlarge", ("1", "1", "224Gi"), 2),
        ("g6e.2xlarge", ("1", None, "56Gi"), 2),
    ],
)
def test_another_type_of_node(
    instance: str, student: tuple[str, str | None, str], teachers: int
) -> None:
    rendered = _render(overlay="hyperpod", instance=instance, nodes=2)
    container = main_container(rendered.job)
    limits = container["resources"]["limits"]
    names = ("nvidia.com/gpu", "vpc.amazonaws.com/efa", "memory")
    assert tuple(limits.get(name) for name in names) == student
    assert f"--nproc-per-node={student[0]}" in container["command"]
    teacher = _render("cache-teacher", "hyperpod", instance=instance, nodes=2)
    assert replica_specs(teacher.job)["Worker"]["replicas"] == teachers
    # As many nodes as the overlay has, where none are named.
    teacher = _render("cache-teacher", "hyperpod", instance=instance)
    assert replica_specs(teacher.job)["Worker"]["replicas"] == teachers // 2


def _spanning(tensor: int, stages: int, **more: str) -> list[str]:
    options = {"pipeline_parallel_size": stages, **more}
    return [
        "--teacher.tensor_parallel_size", str(tensor),
        "--teacher.engine_options", json.dumps(options),
    ]  # fmt: skip


def test_stages_of_a_pipeline_are_gpus_of_a_worker() -> None:
    teacher = _render("cache-teacher", "hyperpod", nodes=1, flags=_spanning(2, 2))
    assert replica_specs(teacher.job)["Worker"]["replicas"] == 2
    assert main_container(teacher.job)["resources"]["limits"]["nvidia.com/gpu"] == "4"


def test_a_teacher_that_spans_nodes() -> None:
    """A worker is a node; of each group of them the first leads (stages/teacher_group.py)."""
    flags = _spanning(8, 2, distributed_executor_backend="ray")
    for more, workers in (({}, 2), ({"nodes": 4, "queue": "q"}, 4)):
        teacher = _render("cache-teacher", "hyperpod", flags=flags, **more)
        container = main_container(teacher.job)
        assert replica_specs(teacher.job)["Worker"]["replicas"] == workers
        assert container["command"] == ["python", "-m", "stages.teacher_group"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
        variables = {item["name"]: item for item in container["env"]}
        assert variables["DISTILL_GROUP_NODES"]["value"] == "2"
        label = "metadata.labels['training.kubeflow.org/job-name']"
        assert variables["DISTILL_JOB"]["valueFrom"]["fieldRef"]["fieldPath"] == label
    policy = find(teacher.documents, "NetworkPolicy")
    assert policy is not None
    to_pods = policy["spec"]["egress"][1]["to"][0]["podSelector"]["matchExpressions"][0]
    assert "cache-teacher" in to_pods["values"]


@pytest.mark.parametrize(
    ("flags", "more", "match"),
    [
        (_spanning(8, 2), {}, r"16 GPUs, more than the 8 of .*; expected distributed_executor_ba"),
        (_spanning(8, 2, distributed_executor_backend="ray"), {"nodes": 3}, r"a multiple of 2"),
        (_spanning(8, 2, distributed_executor_backend="ray"), {"nodes": 4}, r"without a queue"),
        (_spanning(4, 3, distributed_executor_backend="ray"), {}, r"12 GPUs; expected whole nodes"),
        (
            _spanning(8, 2, distributed_executor_backend="ray"), {"operator": "trainer"},
            r"operator trainer: given for a teacher of 2 nodes",
        ),
        (_spanning(16, 1, distributed_executor_backend="ray"), {}, r"image has no EFA; let the no"),
    ],
)  # fmt: skip
def test_teachers_that_cannot_span_nodes(
    flags: list[str], more: dict[str, Any], match: str
) -> None:
    _rejected(stage="cache-teacher", overlay="hyperpod", flags=flags, match=match, **more)


@pytest.mark.parametrize("parallel", [3, 16])
def test_an_engine_that_does_not_fit_a_node(parallel: int) -> None:
    _rejected(
        stage="cache-teacher", overlay="hyperpod",
        flags=["--teacher.tensor_parallel_size", str(parallel)],
        match=rf"tensor_parallel_size: found {parallel}; expected a divisor of the 8 GPUs that",
    )  # fmt: skip


def test_paths_are_on_the_volume(tmp_path: Path) -> None:
    config = _config(_render())
    assert config["cache_dir"] == "/fsx/runs/exp1/cache"
    assert config["output"]["output_dir"] == "/fsx/runs/exp1/student"
    # The local default means the run's own folder, here too.
    config = _config(_render(config="stages/configs/student.yaml"))
    assert config["cache_dir"] == "/fsx/runs/exp1/cache"
    # Another relative folder is on the volume, an absolute one must.
    config = _config(_render(flags=["--cache_dir", "old/cache", "--output_dir", "/fsx/mine"]))
    assert (config["cache_dir"], config["output"]["output_dir"]) == ("/fsx/old/cache", "/fsx/mine")
    for path in ("/data/cache", "s3://bucket/cache", "/fsx/../etc", "/fsxx/cache"):
        _rejected(
            flags=["--cache_dir", path],
            match=rf"cache_dir: found {re.escape(path)}, expected a path on the volume",
        )


@pytest.mark.parametrize(
    ("teacher", "student", "cache"),
    [
        ("qwen3-32b/teacher-chat", "qwen3-32b/student-4b", "qwen3-32b-chat"),
        ("arcee-spark/teacher", "arcee-spark/student", "arcee-spark"),
    ],
)
def test_a_recipe_renders(teacher: str, student: str, cache: str) -> None:
    """Its cache is on the volume, for both stages alike."""
    caches = set()
    for stage, name in (("cache-teacher", teacher), ("train-student", student)):
        rendered = _render(stage, "hyperpod", config=f"stages/configs/recipes/{name}.yaml")
        caches.add(_config(rendered)["cache_dir"])
    assert caches == {f"/fsx/runs/{cache}/cache"}


def test_an_unknown_command_is_answered() -> None:
    with pytest.raises(ConfigError, match=r"train-studnet: not a command.*did you mean train-stud"):
        main(["train-studnet"])


def test_small_files_travel_with_the_configuration(tmp_path: Path) -> None:
    spectrum, template = tmp_path / "spectrum.yaml", tmp_path / "chat.jinja"
    spectrum.write_text("unfrozen_parameters: [mlp]\n")
    template.write_text("{{ messages }}")
    student = _render(flags=["--layers_to_unfreeze", str(spectrum), "--student.freeze", "[]"])
    assert _config(student)["student"]["layers_to_unfreeze"] == "/etc/distill/spectrum.yaml"
    teacher = _render("cache-teacher", flags=["--chat_template", str(template)])
    assert _config(teacher)["corpus"]["chat_template"] == "/etc/distill/chat.jinja"
    found = find(teacher.documents, "ConfigMap")
    assert found is not None
    assert found["data"]["chat.jinja"] == "{{ messages }}"
    assert TeacherRun.model_validate(_config(teacher)) == teacher.settings


def test_a_configuration_carries_no_other_files(tmp_path: Path) -> None:
    """It may be somebody else's: neither other kinds, nor files from outside its folder."""
    folder, elsewhere = tmp_path / "config", tmp_path / "home"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "kube.yaml").write_text("users: []\n")
    (folder / "link.yaml").symlink_to(elsewhere / "kube.yaml")
    (folder / "netrc").write_text("machine a\n")
    (folder / "fine.yaml").write_text("unfrozen_parameters: [mlp]\n")
    (folder / "large.yaml").write_text("#" * 300_000)
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe")

    def config(file: Path | str, field: str = "layers_to_unfreeze") -> str:
        path = folder / "student.yaml"
        path.write_text(yaml.safe_dump({"student": {"freeze": [], field: str(file)}}))
        return str(path)

    for file, reason in (
        (elsewhere / "kube.yaml", "expected a file below the configuration's folder"),
        (folder / "../home/kube.yaml", "expected a file below the configuration's folder"),
        (folder / "link.yaml", "expected a file below the configuration's folder"),
        (folder / "netrc", "expected a file that ends in .yaml or .yml"),
        (folder / "large.yaml", "at most 256 KiB"),
        (folder / "bytes.yaml", "expected a text in UTF-8"),
    ):
        _rejected(config=config(file), match=re.escape(f"found {file}, ") + ".*" + reason)
    assert _config(_render(config=config(folder / "fine.yaml")))["student"]["layers_to_unfreeze"]
    for name in ("../../etc", "a/../../b"):
        _rejected(config=config(name, "model"), match="student.model: found .* without `..`")
    teacher = folder / "teacher.yaml"
    teacher.write_text(yaml.safe_dump({"corpus": {"chat_template": "/etc/passwd"}}))
    _rejected(stage="cache-teacher", config=str(teacher), match="a file that ends in .jinja")


def test_what_was_pushed_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="run `make push-images`"):
        render_job(stage="train-student", run="a", overlay="hyperpod")
    (tmp_path / "runs/k8s").mkdir(parents=True)
    image = EXAMPLE_IMAGES["train-student"]
    (tmp_path / "runs/k8s/images.json").write_text(json.dumps({"distill-student": image}))
    rendered = render_job(stage="train-student", run="a", overlay="hyperpod")
    assert main_container(rendered.job)["image"] == image
    # Not on a local cluster, which loads its images itself.
    local = render_job(stage="train-student", run="a", overlay="local-kind")
    assert main_container(local.job)["image"] == "distill-student:cpu"


def test_another_namespace() -> None:
    rendered = _render(overlay="hyperpod", namespace="hyperpod-ns-research")
    assert {i["metadata"]["namespace"] for i in rendered.documents} == {"hyperpod-ns-research"}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such overlay": ({"overlay": "p6"}, r"overlay 'p6': no such overlay; expected one of hyper"),
    "no such type of node": (
        {"overlay": "hyperpod", "instance": "p9"}, r"instance 'p9': none is called so; expected",
    ),
    "several types of node": (
        {"overlay": "hyperpod", "instance": "p5"}, r"several are called so; expected one of ml.p5",
    ),
    "a type where none is selected": ({"instance": "p5en"}, r"selects no type of node"),
    "no network level": (
        {"topology": "a b"}, r"topology 'a b': not a label of nodes",
    ),
    "no such field": (
        {"flags": ["--loss.temprature", "2"]}, r"--loss.temprature: unknown flag; did you mean",
    ),
    "a flag of the other stage": (
        {"flags": ["--teacher_model", "x"]},
        r"--teacher_model: unknown flag here; it belongs to make cache-teacher",
    ),
    "a value that does not fit": ({"flags": ["--alpha", "3"]}, r"loss.alpha: found 3"),
    "no such file": ({"config": "no/where.yaml"}, r"no/where.yaml: cannot be read"),
    "a run's name": ({"run": "Exp_1"}, r"run 'Exp_1'; expected lower-case letters"),
    "a long name": ({"run": "a" * 40}, r"at most 2\d"),
    "no nodes": ({"nodes": 0}, r"nodes: found 0; expected 1 or more"),
    "a model that the pods do not see": (
        {"flags": ["--student_model", "/home/me/model"]},
        r"student.model: found /home/me/model, expected a path on the volume",
    ),
    "a push from the pods": (
        {"flags": ["--save_location", "both", "--hub_location", "a/b"]},
        r"save_location: found both, expected fsx: the training pods see no hub token",
    ),
    "a namespace without resume": (
        {"overlay": "hyperpod", "namespace": "ml"}, r"found 'ml', expected kubeflow or one that",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    arguments, match = BAD[what]
    _rejected(match=match, **arguments)


_CONTAINER = "/spec/pytorchReplicaSpecs/Worker/template/spec/containers/0"


def _overlay(base: str, *operations: dict[str, str], name: str = "train-student") -> str:
    """Return a kustomization that patches a stage."""
    patch = {"target": {"kind": "PyTorchJob", "name": name}, "patch": yaml.safe_dump(operations)}
    return yaml.safe_dump({"resources": [base], "patches": [patch] if operations else []})


def _gpus(part: str) -> dict[str, str]:
    path = f"{_CONTAINER}/resources/{part}/nvidia.com~1gpu"
    return {"op": "replace", "path": path, "value": "16"}


# An overlay as somebody might write it: the text of its kustomization, and the expected message.
OVERLAYS = {
    "not YAML": ("resources: [../", r"Kustomize rejects it"),
    "an unknown field": ("resurces: []", r"Kustomize rejects it: .*unknown field"),
    "a base that is not there": ("resources: [../nowhere]", r"Kustomize rejects it: .*nowhere"),
    "without the stages": ("resources: [other.yaml]", r"no PyTorchJob named train-student"),
    "a patch that takes the image away": (
        _overlay("../base", {"op": "remove", "path": f"{_CONTAINER}/image"}),
        r"no image; expected what the base has",
    ),
    "a patch that takes the volume away": (
        _overlay("../base", {"op": "remove", "path": f"{_CONTAINER}/volumeMounts"}),
        r"no mounted PersistentVolumeClaim; expected one",
    ),
    "a patch that takes all containers away": (
        _overlay("../base", {"op": "remove", "path": _CONTAINER.removesuffix("/0")}),
        r"no Worker with a pod template and containers",
    ),
    "more GPUs than the node has": (
        _overlay("../overlays/hyperpod", _gpus("limits"), _gpus("requests")),
        r"nvidia.com/gpu: found 16, expected a divisor of the 8 that ml.p5.48xlarge has",
    ),
}


@pytest.mark.parametrize("what", OVERLAYS)
def test_a_malformed_overlay(what: str, tmp_path: Path) -> None:
    text, match = OVERLAYS[what]
    shutil.copytree(ROOT, tmp_path / "k8s", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    folder = tmp_path / "k8s/mine"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(text)
    shutil.copy(ROOT / "base/serviceaccount.yaml", folder / "other.yaml")
    image = None if "image" in what else EXAMPLE_IMAGES["train-student"]
    _rejected(overlay=str(folder), image=image, match=match)


def test_kubectl_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECTL", "kubectl-nowhere")
    with pytest.raises(DistillError, match=r"kubectl-nowhere: no such program; expected kubectl"):
        _render()
