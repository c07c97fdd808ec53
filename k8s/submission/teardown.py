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
    refused: list[str] = []
    found = dict(_found(kubectl, namespace, secret))
    volume = None
    try:
        volume = _volume(kubectl, namespace)
    except DistillError as error:  # volumes are the cluster's: jobs go all the same
        refused.append(f"claim {_PVC} is left: {error}")
    for kind, names in found.items():
        print(f"{kind}: {', '.join(names)}")
    if volume is not None:
        print(f"persistentvolumeclaims: {_PVC}, volume {volume.name} ({volume.file_system})")
    if not found and volume is None and not refused:
        print(f"nothing of this project is in namespace {namespace}")
        return
    if dry:
        return
    if not yes and (ask is None or ask("Delete these? [y/N] ").strip().lower() != "y"):
        raise DistillError(
            f"namespace {namespace}: nothing was deleted",
            expected="a yes on the terminal, or YES=1",
        )

    def do(*words: str) -> str | None:
        """Run kubectl and print what it says, unless it lists; None where it is refused."""
        done = kubectl.run(*words, timeout_s=900)
        if done.returncode:
            refused.append(f"kubectl {' '.join(words)}: {done.stderr.strip()[:300]}")
            return None
        if words[0] != "get":
            print(done.stdout, end="", flush=True)
        return done.stdout

    for kind, names in found.items():
        do("delete", "--ignore-not-found", "-n", namespace, kind, *names)
    if volume is not None:
        _delete_volume(namespace, volume, data, ask, do)
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
    annotations = ((found or {}).get("metadata") or {}).get("annotations") or {}
    return Volume(
        name=name,
        file_system=str((spec.get("csi") or {}).get("volumeHandle") or name),
        is_ours="pv.kubernetes.io/provisioned-by" in annotations,
        is_kept=spec.get("persistentVolumeReclaimPolicy", "Retain") == "Retain",
    )


def _delete_volume(
    namespace: str,
    volume: Volume,
    data: str | None,
    ask: Callable[[str], str] | None,
    do: Callable[..., str | None],
) -> None:
    """Delete claim and volume; the file system where its id was given and the cluster made it.

    Where the volume is refused, the claim stays, by which a cluster-admin finds it later.
    """
    gone = ("delete", "--ignore-not-found")
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
        if do("patch", "persistentvolume", volume.name, "--type=merge", "-p", patch) is None:
            return
    if not doomed and volume.name:
        # Kubernetes keeps it until its claim has gone.
        if do(*gone, "persistentvolume", volume.name, "--wait=false") is None:
            return
        print(
            f"kept: file system {volume.file_system} and its data, which is billed; `make "
            "fsx-volume FSX_ID=...` uses it again, `aws fsx delete-file-system --file-system-id "
            f"{volume.file_system}` deletes it"
        )
    do(*gone, "-n", namespace, "persistentvolumeclaim", _PVC)
    listed = do("get", "persistentvolumeclaims", "-A", "-o", "json")
    pvcs = [] if listed is None else json.loads(listed)["items"]
    in_use = any(pvc["spec"].get("storageClassName") == _CLASS for pvc in pvcs)
    if listed is not None and not in_use:
        do(*gone, "storageclass", _CLASS)


def _get(kubectl: Kubectl, *words: str) -> Object | None:
    *place, kind, name = words
    text = kubectl.ask(*place, "get", kind, name, "-o", "json", "--ignore-not-found")
    found: Object | None = json.loads(text) if text.strip() else None
    return found
