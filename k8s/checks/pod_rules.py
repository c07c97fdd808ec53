"""Rules for pods: Pod Security "restricted", required fields, the resources of a node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from k8s.checks.job_rules import GPU, gpus_of, instance_type
from k8s.cluster.instances import INSTANCES, quantity
from k8s.cluster.objects import Object, containers, name_of, pod_spec

__all__ = ["EFA", "pod_mistakes", "restricted_mistakes"]

EFA = "vpc.amazonaws.com/efa"
_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
    "projected", "secret",
}  # fmt: skip


def restricted_mistakes(item: Object) -> list[str]:
    """Return where a pod violates the Pod Security profile "restricted" (and a read-only root)."""
    spec = pod_spec(item)
    found = []
    pod_context = spec.get("securityContext") or {}
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            found.append(f"{field}: found true, expected none")
    for volume in spec.get("volumes") or []:
        for kind in set(volume) - {"name"} - _VOLUMES:
            found.append(f"volume {volume.get('name')}: found {kind}, expected none of that kind")
    for container in containers(spec):
        found += [
            f"container {container.get('name')}: {line}"
            for line in _restricted_container(container, pod_context)
        ]
    return [f"{name_of(item)}: {line}" for line in found]


def _restricted_container(container: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    own = container.get("securityContext") or {}
    both = {**pod, **own}
    if both.get("runAsNonRoot") is not True or not both.get("runAsUser"):
        yield "expected runAsNonRoot and a numeric runAsUser other than 0"
    if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
        yield "expected allowPrivilegeEscalation: false"
    capabilities = own.get("capabilities") or {}
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add", []) not in (
        [],
        ["NET_BIND_SERVICE"],
    ):
        yield "expected capabilities that drop ALL and add none"
    profile = (both.get("seccompProfile") or {}).get("type")
    if profile not in ("RuntimeDefault", "Localhost"):
        yield "expected seccompProfile RuntimeDefault"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "expected readOnlyRootFilesystem: true"
    if any(port.get("hostPort") for port in container.get("ports") or []):
        yield "expected no hostPort"


def pod_mistakes(item: Object, *, images_required: bool = True) -> list[str]:
    """Return what is missing or too much in a pod of a stage, one line each.

    Args:
        item: a Pod, a Job or a PyTorchJob (its workers).
        images_required: whether images must come from a registry already.
    """
    found = []
    spec = pod_spec(item)
    instance = instance_type(item)
    for container in containers(spec):
        lines = [
            *_parts(container, spec),
            *_image(str(container.get("image", "")), instance is not None and images_required),
            *_accelerators(container, instance),
            *_shares(container, spec, instance),
        ]
        found += [f"container {container.get('name')}: {line}" for line in lines]
    if spec.get("automountServiceAccountToken") is not False:
        found.append("expected automountServiceAccountToken: false (no pod talks to the API)")
    return [f"{name_of(item)}: {line}" for line in found]


def _parts(container: dict[str, Any], spec: dict[str, Any]) -> Iterator[str]:
    for part in ("image", "command", "volumeMounts"):
        if not container.get(part):
            yield f"no {part}; expected what the base has (did a patch replace the list?)"
    known = {volume.get("name") for volume in spec.get("volumes") or []}
    for mount in container.get("volumeMounts") or []:
        if mount.get("name") not in known:
            yield f"mount {mount.get('mountPath')}: no volume {mount.get('name')!r}"
    words = [str(word) for word in container.get("command") or []]
    if words and words[0].rsplit("/", 1)[-1] in ("sh", "bash"):
        yield (
            f"command: found a shell ({words[0]}), expected the program itself: a shell does not "
            "pass SIGTERM on"
        )


def _image(image: str, in_registry: bool) -> Iterator[str]:
    name, _, digest = image.partition("@")
    tag = name.rsplit("/", 1)[-1].partition(":")[2]
    if tag == "latest" or (in_registry and not tag and not digest):
        yield f"image: found {image or 'none'}, expected a tag other than latest, or a digest"
    if in_registry and "." not in name.partition("/")[0]:
        yield (
            f"image: found {image or 'none'}, expected one in a registry that the nodes reach; run "
            "`make push-images`, or name it with IMAGE="
        )


def _accelerators(container: dict[str, Any], instance: str | None) -> Iterator[str]:
    resources = container.get("resources") or {}
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    for name in (GPU, EFA):
        if name in requests and str(requests[name]) != str(limits.get(name)):
            yield f"{name}: found {requests[name]} requested and a limit of {limits.get(name)}"
    gpus, efa = gpus_of(container), quantity(limits.get(EFA, 0))
    if not gpus and not efa:
        return
    if instance is None:
        yield f"found {gpus} GPUs and no instance type, expected a nodeSelector for one"
        return
    node = INSTANCES.get(instance)
    if node is None:
        yield f"instance type: found {instance}, expected one of {', '.join(INSTANCES)}"
        return
    if gpus > node.gpus or node.gpus % max(gpus, 1):
        yield f"{GPU}: found {gpus}, expected a divisor of the {node.gpus} that {instance} has"
    if efa and (efa != node.efa or gpus != node.gpus):
        yield (
            f"{EFA}: found {limits[EFA]} and {gpus} GPUs, expected {node.efa} and {node.gpus} "
            f"as {instance} has them"
        )


def _shares(container: dict[str, Any], spec: dict[str, Any], instance: str | None) -> Iterator[str]:
    resources = container.get("resources") or {}
    memory = quantity((resources.get("limits") or {}).get("memory"))
    requests = resources.get("requests") or {}
    if memory != memory or "memory" not in requests or "cpu" not in requests:
        yield "resources: expected requests for cpu and memory, and a memory limit"
        return
    if not all("ephemeral-storage" in (resources.get(p) or {}) for p in ("requests", "limits")):
        yield "ephemeral-storage: expected a request and a limit (a full disk evicts neighbours)"
    for volume in spec.get("volumes") or []:
        directory = volume.get("emptyDir") or {}
        if "emptyDir" in volume and not directory.get("sizeLimit"):
            yield f"volume {volume['name']}: found no sizeLimit, expected one"
        if directory.get("medium") == "Memory":
            size = quantity(directory.get("sizeLimit"))
            if not size <= memory:
                yield (
                    f"volume {volume['name']}: found {directory.get('sizeLimit')} in memory, "
                    "expected a size below the memory limit"
                )
    node = INSTANCES.get(instance or "")
    if node is None:
        return
    share = gpus_of(container) / node.gpus or 1.0
    if quantity(requests["memory"]) > share * node.allocatable_bytes:
        yield (
            f"memory: found {requests['memory']}, expected at most "
            f"{share * node.allocatable_bytes / 2**30:.0f}Gi of the {node.memory_gib}Gi that "
            f"{instance} has"
        )
    if quantity(requests["cpu"]) > share * node.allocatable_cpus:
        yield (
            f"cpu: found {requests['cpu']}, expected at most {share * node.allocatable_cpus:.0f} "
            f"of the {node.vcpus} that {instance} has"
        )
