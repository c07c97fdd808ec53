"""One run of one stage as objects: Kustomize decides where it runs, this decides which run.

The name of a job carries a digest of everything in it, so the same run rendered twice is the same
job, and a changed value is another.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from k8s.checks.job_rules import LONGEST_NAME, instance_type, nproc_of
from k8s.checks.validate import check_documents
from k8s.cluster.kubectl import overlay_folder, render_kustomization
from k8s.cluster.objects import (
    Object,
    find,
    find_job,
    main_container,
    pod_spec,
    replica_specs,
    volume_root,
)
from k8s.cluster.workloads import Operator
from k8s.rendering.operators import convert
from k8s.rendering.placing import set_instance
from k8s.rendering.run_config import STAGES, Stage, resolve_config
from k8s.rendering.sizing import set_size
from pipeline.config import Settings, fingerprint
from pipeline.errors import ConfigError

__all__ = [
    "PUSHED_IMAGES",
    "RenderedJob",
    "check_run_name",
    "pushed_image",
    "render_job",
    "set_image",
]

PUSHED_IMAGES = Path("runs/k8s/images.json")
"""What `make push-images` pushed: image by name, with digest."""

_QUEUE = "kueue.x-k8s.io/queue-name"
_PRIORITY = "kueue.x-k8s.io/priority-class"
_TOPOLOGY = "kueue.x-k8s.io/podset-preferred-topology"


@dataclass(frozen=True, slots=True)
class RenderedJob:
    """A job, rendered and checked."""

    stage: Stage | Literal["prepare-corpus"]
    run: str
    documents: list[Object]
    settings: Settings
    volume: str
    """Mount path of the shared volume in its pods."""
    converted: Object | None = None
    """The job for another operator than the training operator."""

    @property
    def submitted(self) -> Object:
        """The job as it is submitted."""
        return self.converted or self.job

    @property
    def objects(self) -> list[Object]:
        """All that is submitted."""
        return [self.submitted if item is self.job else item for item in self.documents]

    @property
    def job(self) -> Object:
        """The PyTorchJob; of `prepare-corpus` the Job."""
        found = find(self.documents, "PyTorchJob") or find(self.documents, "Job")
        assert found is not None
        return found

    @property
    def name(self) -> str:
        """Name of the job."""
        return str(self.job["metadata"]["name"])

    @property
    def namespace(self) -> str:
        """Namespace of the job."""
        return str(self.job["metadata"].get("namespace", "default"))

    @property
    def workers(self) -> int:
        """Pods of the PyTorchJob."""
        return int(replica_specs(self.job)["Worker"]["replicas"])

    @property
    def queue(self) -> str | None:
        """Kueue's local queue, which admits the job as a whole."""
        return _in_queue(self.job, None)

    @property
    def world_size(self) -> int:
        """Processes of stage two, over all workers."""
        nproc = nproc_of(main_container(self.job)) or 1
        return nproc * self.workers


def render_job(
    *,
    stage: Stage,
    run: str,
    overlay: str,
    config: str | None = None,
    flags: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    nodes: int | None = None,
    image: str | None = None,
    namespace: str | None = None,
    queue: str | None = None,
    priority: str | None = None,
    instance: str | None = None,
    topology: str | None = None,
    operator: Operator = "kubeflow",
) -> RenderedJob:
    """Render and check the job of one run; nothing is submitted.

    A sweep calls this once per point, with the point's flags and a label of its own.

    Args:
        stage: `cache-teacher` or `train-student`.
        run: name of the run: part of the job's name, and its folder on the volume.
        overlay: a name below k8s/overlays, or a folder.
        config: configuration file of the stage; None takes the overlay's.
        flags: as on the stage's command line, above the file.
        labels: further labels of job and pods, such as `distill/sweep`.
        nodes: machines; None takes the overlay's. A teacher has as many workers a node as engines
            fit there (GPUs / teacher.tensor_parallel_size); without GPUs, nodes are workers.
        image: image of the stage; None takes what `make push-images` wrote, else the overlay's.
        namespace: None takes the overlay's.
        queue: Kueue's local queue.
        priority: Kueue's priority class.
        instance: type of the nodes; None takes the overlay's.
        topology: label of a level of the network that Kueue should place all workers within.
        operator: who runs stage two; stage one needs none but the first.

    Raises:
        ConfigError: with every mistake of overlay, configuration and result.
    """
    if stage not in STAGES:
        raise ConfigError(f"stage {stage!r}: unknown", expected=" or ".join(STAGES))
    check_run_name(stage, run)
    folder = overlay_folder(overlay)
    documents = copy.deepcopy(render_kustomization(folder))
    job = find_job(documents, stage, source=str(folder))
    if instance is not None:
        set_instance(job, instance)
    volume = volume_root(job)
    config_map = _config_map(job, documents)
    resolved = resolve_config(
        stage,
        run=run,
        volume=volume,
        config=config,
        default=config_map["data"].get("config.yaml", ""),
        flags=flags,
        metrics_port=_metrics_port(job),
    )
    kept = [
        item
        for item in documents
        if item["kind"] not in ("PyTorchJob", "ConfigMap") or item is job or item is config_map
    ]
    if namespace is not None:
        _set_namespace(kept, namespace)
    if image is None and instance_type(job) is not None:  # a local cluster takes no pushed image
        image = pushed_image("distill-teacher" if stage == "cache-teacher" else "distill-student")
    set_image(job, image)
    set_size(job, nodes, resolved.settings, in_queue=_in_queue(job, queue), operator=operator)
    _set_labels(job, run, labels, queue, priority)
    if topology is not None:
        _set_topology(job, topology)
    config_map["data"] = dict(resolved.files)
    digest = fingerprint([job, config_map["data"]])[:8]
    name = f"{stage}-{run}-{digest}"
    job["metadata"]["name"] = name
    config_map["metadata"]["name"] = name
    _config_volume(job)["configMap"]["name"] = name
    check_documents(kept, source=overlay)
    rendered = RenderedJob(stage, run, kept, resolved.settings, volume)
    if operator != "kubeflow":
        rendered = replace(rendered, converted=convert(job, operator))
        check_documents(rendered.objects, source=f"{overlay}, operator {operator}")
    return rendered


def pushed_image(name: str) -> str | None:
    """Return the image with digest that `make push-images` wrote, None where it wrote none."""
    try:
        images = json.loads(PUSHED_IMAGES.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    image = images.get(name) if isinstance(images, dict) else None
    return str(image) if image else None


def set_image(item: Object, image: str | None) -> None:
    """Set the image of a workload's main container; None leaves it."""
    if image is not None:
        main_container(item)["image"] = image


def check_run_name(stage: str, run: str) -> None:
    """Reject a run whose jobs could not be named after it.

    Raises:
        ConfigError: other characters, or too many.
    """
    longest = LONGEST_NAME - len(stage) - len("--12345678")
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", run) or len(run) > longest:
        raise ConfigError(
            f"run {run!r}",
            expected=f"lower-case letters, digits and dashes, at most {longest} (it becomes a "
            "part of the job's name)",
            do="give another RUN=",
        )


def _metrics_port(job: Object) -> int | None:
    """Return the port that the pods open for a scraper, None where they open none."""
    ports = main_container(job).get("ports") or []
    return next((int(port["containerPort"]) for port in ports if port["name"] == "metrics"), None)


def _config_volume(job: Object) -> dict[str, Any]:
    for volume in pod_spec(job).get("volumes") or []:
        if volume.get("name") == "config" and isinstance(volume.get("configMap"), dict):
            found: dict[str, Any] = volume
            return found
    raise ConfigError(
        f"PyTorchJob/{job['metadata']['name']}: no volume named config with a configMap",
        expected="the one that k8s/base has",
    )


def _config_map(job: Object, documents: Sequence[Object]) -> Object:
    name = _config_volume(job)["configMap"].get("name")
    found = find(documents, "ConfigMap", name)
    if found is None:
        raise ConfigError(
            f"ConfigMap {name!r}: named by PyTorchJob/{job['metadata']['name']}, not in the render",
            expected="the configMapGenerator of k8s/base",
        )
    return found


def _set_namespace(documents: Sequence[Object], namespace: str) -> None:
    for item in documents:
        if item["kind"] == "Namespace":
            item["metadata"]["name"] = namespace
        elif "namespace" in item["metadata"]:
            item["metadata"]["namespace"] = namespace


def _in_queue(job: Object, given: str | None) -> str | None:
    found = given or (job["metadata"].get("labels") or {}).get(_QUEUE)
    return str(found) if found else None


def _set_labels(
    job: Object,
    run: str,
    labels: Mapping[str, str] | None,
    queue: str | None,
    priority: str | None,
) -> None:
    template = replica_specs(job)["Worker"]["template"].setdefault("metadata", {})
    for holder in (job["metadata"], template):
        holder["labels"] = {**(holder.get("labels") or {}), "distill/run": run, **(labels or {})}
    # The queue admits the job as a whole; its pods carry no queue of their own.
    for label, value in ((_QUEUE, queue), (_PRIORITY, priority)):
        if value is not None:
            job["metadata"]["labels"][label] = value


def _set_topology(job: Object, level: str) -> None:
    """Ask Kueue's topology-aware scheduling to keep the workers close."""
    if not re.fullmatch(r"([a-z0-9.-]+/)?[A-Za-z0-9][\w.-]*", level):
        raise ConfigError(
            f"topology {level!r}: not a label of nodes",
            expected="a level of the cluster's Topology, such as topology.k8s.aws/"
            "network-node-layer-3",
        )
    template = replica_specs(job)["Worker"]["template"].setdefault("metadata", {})
    template["annotations"] = {**(template.get("annotations") or {}), _TOPOLOGY: level}
