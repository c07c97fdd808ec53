"""Delete what this project has in a namespace; the data only where its file system is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from k8s.cluster.kubectl import Kubectl
from k8s.cluster.objects import Object
from k8s.cluster.workloads import PROJECT_LABEL, WORKLOADS
from pipeline.errors import DistillError

__all__ = ["Volume", "teardown"]

_KINDS = (
    *(workload.resource for workload in WORKLOADS.values()),
    "podmonitors.monitoring.coreos.com", "configmaps", "networkpolicies.networking.k8s.io",
    "serviceaccounts",
)  # fmt: skip
_PVC, _CLASS = "fsx-claim", "distill-fsx"


@dataclass(frozen=True, slots=True)
class Volume:
    """The volume behind the claim."""

    name: str
    file_system: str
    """Its id; of a volume that is none of FSx, the volume's name."""
    is_ours: bool
    """Whether the cluster made the file system for the claim."""
    is_kept: bool
    """Whether the file system outlives the claim (`Retain`)."""


def teardown(
    namespace: str,
    *,
    secret: str,
    data: str | None,
    yes: bool,
    dry: bool = False,
    ask: Callable[[str], str] | None = None,
) -> None:
    """Delete jobs and what belongs to them, then claim and volume.

    Args:
        namespace: of the overlay.
        secret: of the hub token; `none` where there is none.
        data: id of the file system whose data may go; None: asked for, where someone can answer.
        yes: whether to go on without asking for the rest.
        dry: only say what is there.
        ask: puts a question; None: on the terminal, where there is one.

    Raises:
        DistillError: nobody said yes, or the API server refuses something; the rest is deleted.
    """
    kubectl = Kubectl()
    if ask is None and sys.stdin.isatty():
        ask = input
    found = dict(_found(kubectl, namespace, secret))
    volume = _volume(kubectl, namespace)
    for kind, names in found.items():
        print(f"{kind}: {', '.join(names)}")
    if volume is not None:
        print(f"persistentvolumeclaims: {_PVC}, volume {volume.name} ({volume.file_system})")
    if not found and volume is None:
        print(f"nothing of this project is in namespace {namespace}")
        return
    if dry:
        return
    if not yes and (ask is None or ask("Delete these? [y/N] ").strip().lower() != "y"):
        raise DistillError(
            f"namespace {namespace}: nothing was deleted",
            expected="a yes on the terminal, or YES=1",
        )
    refused: list[str] = []

    def delete(*words: str) -> None:
        done = kubectl.run("delete", "--ignore-not-found", *words, timeout_s=900)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            refused.append(f"kubectl delete {' '.join(words)}: {done.stderr.strip()[:300]}")

    for kind, names in found.items():
        delete("-n", namespace, kind, *names)
    if volume is not None:
        _delete_volume(kubectl, namespace, volume, data, ask, delete)
    if refused:
        raise DistillError(
            f"{len(refused)} refused:" + "".join(f"\n  - {line}" for line in refused),
            do="volumes and storage classes need a cluster-admin",
        )
    print(f"the namespace is left: kubectl delete namespace {namespace}")


def _found(kubectl: Kubectl, namespace: str, secret: str) -> Iterator[tuple[str, list[str]]]:
    for kind in _KINDS:
        items = kubectl.items(namespace, kind, PROJECT_LABEL)
        if names := [str(item["metadata"]["name"]) for item in items]:
            yield kind, names
    if secret != "none" and _get(kubectl, "-n", namespace, "secret", secret) is not None:
        yield "secrets", [secret]


def _volume(kubectl: Kubectl, namespace: str) -> Volume | None:
    pvc = _get(kubectl, "-n", namespace, "persistentvolumeclaim", _PVC)
    if pvc is None:
        return None
    name = str(pvc["spec"].get("volumeName") or "")
    found = _get(kubectl, "persistentvolume", name) if name else None
    spec = (found or {"spec": {}})["spec"]
    return Volume(
        name=name,
        file_system=str((spec.get("csi") or {}).get("volumeHandle") or name),
        is_ours="pv.kubernetes.io/provisioned-by" in str(found),
        is_kept=spec.get("persistentVolumeReclaimPolicy", "Retain") == "Retain",
    )


def _delete_volume(
    kubectl: Kubectl,
    namespace: str,
    volume: Volume,
    data: str | None,
    ask: Callable[[str], str] | None,
    delete: Callable[..., None],
) -> None:
    """Delete claim and volume; the file system where its id was given and the cluster made it."""
    if data is None and volume.is_ours and ask is not None:
        data = ask(f"Type {volume.file_system} to delete it with all caches and students: ").strip()
    doomed = volume.is_ours and bool(volume.name) and data == volume.file_system
    if not doomed and volume.is_ours and not volume.is_kept:
        print(
            f"kept: claim {_PVC}, whose deletion would delete its data; DATA={volume.file_system}"
            " deletes both"
        )
        return
    if doomed and volume.is_kept:
        patch = '{"spec":{"persistentVolumeReclaimPolicy":"Delete"}}'
        kubectl.ask("patch", "persistentvolume", volume.name, "--type=merge", "-p", patch)
    delete("-n", namespace, "persistentvolumeclaim", _PVC)
    if not doomed and volume.name:
        delete("persistentvolume", volume.name)
        print(
            f"kept: file system {volume.file_system} and its data, which is billed; `make "
            "fsx-volume FSX_ID=...` uses it again, `aws fsx delete-file-system --file-system-id "
            f"{volume.file_system}` deletes it"
        )
    pvcs = json.loads(kubectl.ask("get", "persistentvolumeclaims", "-A", "-o", "json"))["items"]
    if not any(pvc["spec"].get("storageClassName") == _CLASS for pvc in pvcs):
        delete("storageclass", _CLASS)


def _get(kubectl: Kubectl, *words: str) -> Object | None:
    *place, kind, name = words
    text = kubectl.ask(*place, "get", kind, name, "-o", "json", "--ignore-not-found")
    found: Object | None = json.loads(text) if text.strip() else None
    return found
