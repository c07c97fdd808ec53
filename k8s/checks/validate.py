"""Everything a render must pass before it is shown or submitted; all mistakes at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from k8s.checks.job_rules import job_mistakes
from k8s.checks.pod_rules import pod_mistakes, restricted_mistakes
from k8s.checks.schema import schema_mistakes
from k8s.cluster.expand import OPERATORS, pods_for
from k8s.cluster.objects import Object, containers, find, main_container, name_of, pod_spec
from pipeline.errors import ConfigError

__all__ = ["check_documents", "document_mistakes", "token_mistakes"]

PREREQUISITES = {"PersistentVolumeClaim": {"fsx-claim"}}
"""What a render may name without containing it; ops/fsx-static or fsx-dynamic creates it."""

_WORKLOADS = ("PyTorchJob", "HyperPodPyTorchJob", "Job", "Pod")
_OFFLINE = ("cache-teacher", "train-student", "check-cache", "prepare-corpus")
_AS_ROOT = ("fsx-init",)
_TOKENS = re.compile(
    r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|A(?:KI|SI)A[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{20,}|xox[abp]-[A-Za-z0-9-]{10,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    # Of netrc, ~/.aws/credentials, docker's config.json and an address with a password in it.
    r"|(?i:\bmachine\s+\S+\s+(?:login\s+\S+\s+)?password\s+\S)"
    r"|(?i:aws_?(?:secret_?access_?key|session_?token)[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+=]{20,})"
    r"|\"auth\"\s*:\s*\"[A-Za-z0-9+/=]{12,}\"|://[^/\s:@]+:[^/\s:@]+@"
)
_SECRET_NAMES = re.compile(r"(?i)(token|secret|password|api_?key|access_?key)(?!.*(path|file))")
_NOT_SECRET = {"TOKENIZERS_PARALLELISM"}


def check_documents(
    documents: Sequence[Object], *, source: str, images_required: bool = True
) -> None:
    """Reject a render with any mistake.

    Raises:
        ConfigError: with all of them.
    """
    found = document_mistakes(documents, images_required=images_required)
    if found:
        raise ConfigError(mistakes=[f"{source}: {line}" for line in found])


def document_mistakes(documents: Sequence[Object], *, images_required: bool = True) -> list[str]:
    """Return one line per mistake: schemas, operator's rules, pods, references, secrets."""
    found: list[str] = []
    for item in documents:
        wrong = schema_mistakes(item)
        found += wrong
        if item["kind"] in _WORKLOADS and not wrong:
            try:
                found += _workload_mistakes(item, documents, images_required)
            except ConfigError as error:
                found.append(str(error))
    found += token_mistakes(documents)
    return list(dict.fromkeys(found))


def _workload_mistakes(
    item: Object, documents: Sequence[Object], images_required: bool
) -> list[str]:
    found = []
    if item["kind"] == "PyTorchJob":
        found += job_mistakes(item)
        if not found:
            # Admission on the cluster sees the pods; the two operators create different ones.
            for operator in OPERATORS:
                pods = pods_for(item, operator)
                for pod in (pods[0], pods[-1]):  # those between differ in their index alone
                    found += schema_mistakes(pod) + restricted_mistakes(pod)
    stage = _stage(item)
    if item["kind"] != "PyTorchJob" and stage not in _AS_ROOT:
        found += restricted_mistakes(item)
    found += pod_mistakes(item, images_required=images_required)
    found += [f"{name_of(item)}: {line}" for line in _references(item, documents)]
    if stage in _OFFLINE:
        found += [f"{name_of(item)}: {line}" for line in _offline(item)]
    return found


def _stage(item: Object) -> str:
    return str((item["metadata"].get("labels") or {}).get("distill/stage", ""))


def _references(item: Object, documents: Sequence[Object]) -> Iterator[str]:
    """ConfigMaps, claims, accounts and Secrets that the pods name."""
    spec = pod_spec(item)
    named: list[tuple[str, Any]] = []
    for volume in spec.get("volumes") or []:
        if "configMap" in volume:
            named.append(("ConfigMap", volume["configMap"].get("name")))
        if "persistentVolumeClaim" in volume:
            named.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        if "secret" in volume and not volume["secret"].get("secretName"):
            yield (
                f"volume {volume['name']}: no Secret's name, expected that of the hub token; give "
                "SECRET=NAME"
            )
    for container in containers(spec):
        for variable in container.get("env") or []:
            source = variable.get("valueFrom") or {}
            if "configMapKeyRef" in source:
                named.append(("ConfigMap", source["configMapKeyRef"].get("name")))
        for source in container.get("envFrom") or []:
            if "configMapRef" in source:
                named.append(("ConfigMap", source["configMapRef"].get("name")))
    if spec.get("serviceAccountName"):
        named.append(("ServiceAccount", spec["serviceAccountName"]))
    for kind, name in named:
        if find(documents, kind, name) is None and name not in PREREQUISITES.get(kind, ()):
            there = sorted(d["metadata"]["name"] for d in documents if d["kind"] == kind)
            known = ", ".join(there) or "none"
            yield f"{kind} {name!r}: not in the render, expected one of {known}"


def _offline(item: Object) -> Iterator[str]:
    """The stages see no Secret and never contact the hub."""
    spec = pod_spec(item)
    if "secret" in json.dumps(spec).lower().replace("automountserviceaccounttoken", ""):
        yield "found a Secret, expected none: only the prefetch job sees the hub token"
    values = {v["name"]: v.get("value") for v in main_container(item).get("env") or []}
    if values.get("HF_HUB_OFFLINE") != "1":
        yield f"HF_HUB_OFFLINE: found {values.get('HF_HUB_OFFLINE')!r}, expected '1'"
    shm = {
        mount["name"]
        for mount in main_container(item).get("volumeMounts") or []
        if mount.get("mountPath") == "/dev/shm"
    }
    volumes = [v for v in spec.get("volumes") or [] if v.get("name") in shm]
    if not volumes or (volumes[0].get("emptyDir") or {}).get("medium") != "Memory":
        yield "/dev/shm: expected an emptyDir in memory mounted there"


def token_mistakes(documents: Sequence[Object]) -> list[str]:
    """Return where a render contains a Secret or something that looks like one."""
    found = []
    for item in documents:
        if item["kind"] == "Secret":
            found.append(
                f"{name_of(item)}: found a Secret, expected it to be made by "
                "`kubectl create secret generic NAME --from-file=token=FILE`"
            )
        for path, text in _texts(item):
            if _TOKENS.search(text):
                found.append(f"{name_of(item)}: {path}: found what looks like a token (not shown)")
        if item["kind"] in _WORKLOADS:
            for container in containers(pod_spec(item)):
                for variable in container.get("env") or []:
                    name = str(variable.get("name"))
                    secret = _SECRET_NAMES.search(name) and name not in _NOT_SECRET
                    if secret and variable.get("value"):
                        found.append(
                            f"{name_of(item)}: environment {name}: found a literal, expected none"
                        )
    return found


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{path}[{index}]")
