"""The small jobs around the two stages: volume, its folder, prefetch."""

from __future__ import annotations

import re
from typing import Any

from k8s.checks.job_rules import instance_type
from k8s.checks.validate import check_documents
from k8s.cluster.kubectl import overlay_folder, render_kustomization
from k8s.cluster.objects import ROOT, Object, find, find_job, main_container, pod_spec
from k8s.rendering.render import pushed_image, set_image
from k8s.rendering.run_config import resolve_config
from pipeline.errors import ConfigError

__all__ = ["fsx_init_job", "fsx_volume", "prefetch_job"]


def prefetch_job(
    *,
    overlay: str,
    secret: str,
    run: str = "default",
    teacher_config: str | None = None,
    student_config: str | None = None,
    teacher_flags: tuple[str, ...] = (),
    student_flags: tuple[str, ...] = (),
    image: str | None = None,
    namespace: str | None = None,
) -> list[Object]:
    """Return the job that downloads models and data set to the volume.

    Raises:
        ConfigError: no Secret's name, or a configuration that its stage would reject.
    """
    if not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", secret):
        raise ConfigError(
            f"secret {secret!r}: not the name of a Secret",
            expected="the one that holds the hub token, such as hub-token",
            do="create it with `kubectl create secret generic hub-token --from-file=token=FILE` "
            "and give SECRET=hub-token, or SECRET=none where all is public",
        )
    documents, base = _op("prefetch", overlay, image=image, namespace=namespace)
    job = documents[-1]
    files = {}
    for stage, config, flags in (
        ("cache-teacher", teacher_config, teacher_flags),
        ("train-student", student_config, student_flags),
    ):
        own = find_job(base, stage, source=overlay)
        reference = next(v for v in pod_spec(own)["volumes"] if v["name"] == "config")
        default = find(base, "ConfigMap", reference["configMap"]["name"])
        resolved = resolve_config(
            stage,  # type: ignore[arg-type]
            run=run,
            volume="/fsx",
            config=config,
            default=default["data"]["config.yaml"] if default else "",
            flags=flags,
        )
        files[f"{stage}.yaml"] = resolved.files["config.yaml"]
        files |= {name: text for name, text in resolved.files.items() if name != "config.yaml"}
    if secret == "none":
        _without_token(pod_spec(job))
    for volume in pod_spec(job)["volumes"]:
        if "secret" in volume:
            volume["secret"]["secretName"] = secret
    documents.insert(
        0,
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": "prefetch-config",
                "namespace": job["metadata"]["namespace"],
                "labels": {"app.kubernetes.io/part-of": "offline-distill"},
            },
            "data": files,
        },
    )
    check_documents(documents, source="k8s/ops/prefetch")
    return documents


def _without_token(spec: dict[str, Any]) -> None:
    """Take the Secret out of a pod that downloads public models and data only."""
    secrets = {volume["name"] for volume in spec["volumes"] if "secret" in volume}
    spec["volumes"] = [v for v in spec["volumes"] if v["name"] not in secrets]
    for container in spec["containers"]:
        container["volumeMounts"] = [
            m for m in container["volumeMounts"] if m["name"] not in secrets
        ]
        container["env"] = [v for v in container["env"] if v["name"] != "HF_TOKEN_PATH"]


def fsx_init_job(
    *, overlay: str, image: str | None = None, namespace: str | None = None
) -> list[Object]:
    """Return the one-off job that owns the project's folder on the volume."""
    documents, _ = _op("fsx-init", overlay, image=image, namespace=namespace)
    check_documents(documents, source="k8s/ops/fsx-init")
    return documents


def fsx_volume(
    *,
    overlay: str,
    namespace: str | None = None,
    file_system: str | None = None,
    mount_name: str | None = None,
    region: str | None = None,
    subnet: str | None = None,
    security_group: str | None = None,
    storage: str = "1200Gi",
    throughput: int = 250,
    efa: bool = False,
) -> list[Object]:
    """Return volume and claim of an FSx file system: an existing one, or a new one by its claim.

    Args:
        overlay: the claim is in its namespace.
        namespace: overrules the overlay's.
        file_system: id of an existing file system (`fs-...`), with `mount_name` and `region`.
        mount_name: as `aws fsx describe-file-systems` gives it.
        region: of the existing file system.
        subnet: of a new file system, with `security_group`.
        security_group: of a new file system.
        storage: its size.
        throughput: of a new file system, MB/s of each TiB.
        efa: of a new file system, whether clients may use EFA.

    Raises:
        ConfigError: neither the one set of values nor the other is complete.
    """
    static = (file_system, mount_name, region)
    dynamic = (subnet, security_group)
    if all(static) == all(dynamic) or (any(static) and any(dynamic)):
        raise ConfigError(
            "the file system is not named",
            expected="either FSX_ID=fs-..., FSX_MOUNT=... and REGION=... of an existing one, or "
            "SUBNET=subnet-... and SECURITY_GROUP=sg-... for a new one",
        )
    for value, pattern, name in (
        (file_system, r"fs-[0-9a-f]{8,17}", "FSX_ID"),
        (mount_name, r"[a-z0-9]{3,20}", "FSX_MOUNT"),
        (region, r"[a-z]{2}(-[a-z]+)+-\d", "REGION"),
        (subnet, r"subnet-[0-9a-f]{8,17}", "SUBNET"),
        (security_group, r"sg-[0-9a-f]{8,17}", "SECURITY_GROUP"),
        (storage, r"\d+(Gi|Ti)", "STORAGE"),
    ):
        if value and not re.fullmatch(pattern, value):
            raise ConfigError(f"{name}: found {value!r}", expected=f"a text like {pattern}")
    if throughput not in (125, 250, 500, 1000):
        raise ConfigError(f"THROUGHPUT: found {throughput}", expected="125, 250, 500 or 1000")
    documents = render_kustomization(
        ROOT / "ops" / ("fsx-static" if all(static) else "fsx-dynamic")
    )
    place = namespace or _namespace(render_kustomization(overlay_folder(overlay)))
    claim = find(documents, "PersistentVolumeClaim")
    assert claim is not None
    claim["metadata"]["namespace"] = place
    claim["spec"]["resources"]["requests"]["storage"] = storage
    volume = find(documents, "PersistentVolume")
    if volume is not None:
        volume["metadata"]["name"] = claim["spec"]["volumeName"] = f"distill-fsx-{place}"
        volume["spec"]["capacity"]["storage"] = storage
        csi: dict[str, Any] = volume["spec"]["csi"]
        csi["volumeHandle"] = file_system
        csi["volumeAttributes"] = {
            "dnsname": f"{file_system}.fsx.{region}.amazonaws.com",
            "mountname": mount_name,
        }
    storage_class = find(documents, "StorageClass")
    if storage_class is not None:
        storage_class["parameters"] |= {
            "subnetId": subnet,
            "securityGroupIds": security_group,
            "perUnitStorageThroughput": str(throughput),
            "efaEnabled": str(efa).lower(),
        }
    check_documents(documents, source="k8s/ops")
    return documents


def _op(
    name: str, overlay: str, *, image: str | None, namespace: str | None
) -> tuple[list[Object], list[Object]]:
    """Return an operation's objects in the overlay's namespace, and the overlay's own."""
    base = render_kustomization(overlay_folder(overlay))
    documents = render_kustomization(ROOT / "ops" / name)
    place = namespace or _namespace(base)
    teacher = find_job(base, "cache-teacher", source=overlay)
    for item in documents:
        item["metadata"]["namespace"] = place
        if item["kind"] == "Job":
            set_image(item, _op_image(item, teacher, image))
    return documents, base


def _op_image(job: Object, teacher: Object, image: str | None) -> str | None:
    """Return the image given, else the teacher's where the operation needs it; None: its own."""
    if image is not None or main_container(job)["image"] != "distill-teacher":
        return image
    pushed = pushed_image("distill-teacher") if instance_type(teacher) is not None else None
    return pushed or str(main_container(teacher)["image"])


def _namespace(documents: list[Object]) -> str:
    for item in documents:
        if item["metadata"].get("namespace"):
            return str(item["metadata"]["namespace"])
    return "default"
