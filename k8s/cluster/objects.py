"""Kubernetes objects as parsed YAML: reading, writing, and access to their common parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError

__all__ = [
    "ROOT",
    "Object",
    "containers",
    "dump_documents",
    "find",
    "find_job",
    "load_documents",
    "main_container",
    "name_of",
    "pod_spec",
    "replica_specs",
    "volume_root",
]

Object = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]


def load_documents(text: str, *, source: str) -> list[Object]:
    """Parse a stream of YAML documents into objects.

    Raises:
        ConfigError: not YAML, or a document that is no Kubernetes object.
    """
    try:
        documents = [item for item in yaml.safe_load_all(text) if item is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "malformed"
        raise ConfigError(f"{source}{where}: {problem}", expected="YAML") from None
    for item in documents:
        named = isinstance(item, dict) and isinstance(item.get("metadata"), dict)
        if not named or not item.get("kind") or not item.get("apiVersion"):
            raise ConfigError(
                f"{source}: a document without apiVersion, kind and metadata",
                expected="Kubernetes objects",
            )
    return documents


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, as people read them."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


_Dumper.add_representer(str, _Dumper.represent_text)


def dump_documents(documents: Iterable[Object]) -> str:
    """Write objects as a stream of YAML documents."""
    parts = [yaml.dump(item, Dumper=_Dumper, sort_keys=False, width=1000) for item in documents]
    return "---\n".join(parts)


def name_of(item: Object) -> str:
    """Return `Kind/name`, as messages name an object."""
    return f"{item['kind']}/{item['metadata'].get('name', '')}"


def find(documents: Iterable[Object], kind: str, name: str | None = None) -> Object | None:
    """Return the first object of a kind (and name), or None."""
    for item in documents:
        if item["kind"] == kind and name in (None, item["metadata"].get("name")):
            return item
    return None


def find_job(documents: Iterable[Object], stage: str, *, source: str) -> Object:
    """Return the PyTorchJob of a stage.

    Raises:
        ConfigError: the overlay has none.
    """
    job = find(documents, "PyTorchJob", stage)
    if job is None:
        raise ConfigError(
            f"{source}: no PyTorchJob named {stage}",
            expected="one, as k8s/base has it",
            do="include ../../base in the overlay's resources, and rename nothing there",
        )
    return job


def replica_specs(job: Object) -> dict[str, Any]:
    """Return `pytorchReplicaSpecs`, empty where the job has none."""
    specs = (job.get("spec") or {}).get("pytorchReplicaSpecs")
    return specs if isinstance(specs, dict) else {}


def pod_spec(item: Object) -> dict[str, Any]:
    """Return the pod spec of a job's workers, or of a Pod.

    Raises:
        ConfigError: the object has none.
    """
    match item["kind"]:
        case "PyTorchJob":
            holder = replica_specs(item).get("Worker")
        case "Job":
            holder = item.get("spec")
        case "HyperPodPyTorchJob":
            holder = next(iter((item.get("spec") or {}).get("replicaSpecs") or []), None)
        case _:
            holder = {"template": item}
    try:
        spec: dict[str, Any] = holder["template"]["spec"]  # type: ignore[index]
        if isinstance(spec["containers"], list) and spec["containers"]:
            return spec
    except (KeyError, TypeError):
        pass
    raise ConfigError(
        f"{name_of(item)}: no Worker with a pod template and containers",
        expected="what k8s/base has",
        do="look for a patch that replaces a list or a mapping",
    )


def containers(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield all containers of a pod spec, init containers first."""
    yield from spec.get("initContainers") or []
    yield from spec.get("containers") or []


def main_container(item: Object) -> dict[str, Any]:
    """Return the container the operator works on, else the only one.

    Raises:
        ConfigError: a PyTorchJob has no container of the name `pytorch`.
    """
    found: list[dict[str, Any]] = pod_spec(item)["containers"]
    for container in found:
        if container.get("name") == "pytorch":
            return container
    if item["kind"] == "PyTorchJob":
        names = ", ".join(str(container.get("name")) for container in found)
        raise ConfigError(
            f"{name_of(item)}: containers {names}",
            expected="one named pytorch (the operator looks for it)",
        )
    return found[0]


def volume_root(item: Object) -> str:
    """Return where the pod sees the shared volume: the mount of its PersistentVolumeClaim.

    Raises:
        ConfigError: no claim is mounted.
    """
    claims = {
        volume["name"]
        for volume in pod_spec(item).get("volumes") or []
        if volume.get("persistentVolumeClaim")
    }
    for mount in main_container(item).get("volumeMounts") or []:
        if mount.get("name") in claims:
            return str(mount["mountPath"]).rstrip("/")
    raise ConfigError(
        f"{name_of(item)}: no mounted PersistentVolumeClaim",
        expected="one for cache and student, as k8s/base mounts it at /fsx",
    )
