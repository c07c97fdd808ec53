"""The discovery answers of the API server's stand-in: kinds, routes, schemas."""

from __future__ import annotations

from typing import Any

_GROUPS: dict[str, list[tuple[str, str, bool]]] = {
    "v1": [
        ("namespaces", "Namespace", False), ("configmaps", "ConfigMap", True),
        ("serviceaccounts", "ServiceAccount", True), ("secrets", "Secret", True),
        ("persistentvolumeclaims", "PersistentVolumeClaim", True),
        ("persistentvolumes", "PersistentVolume", False), ("pods", "Pod", True),
    ],
    "batch/v1": [("jobs", "Job", True)],
    "networking.k8s.io/v1": [("networkpolicies", "NetworkPolicy", True)],
    "storage.k8s.io/v1": [("storageclasses", "StorageClass", False)],
    "kubeflow.org/v1": [("pytorchjobs", "PyTorchJob", True)],
}  # fmt: skip


def api_version(kind: str) -> str:
    return next(
        version for version, kinds in _GROUPS.items() if any(item[1] == kind for item in kinds)
    )


def route(parts: list[str]) -> tuple[str | None, str, str | None, list[str]]:
    """Return kind, namespace, name and what follows of a path."""
    if parts[:1] == ["api"]:
        version, rest = "v1", parts[2:]
    else:
        version, rest = "/".join(parts[1:3]), parts[3:]
    kinds = {plural: kind for plural, kind, _ in _GROUPS.get(version, [])}
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    if not rest or rest[0] not in kinds:
        return None, "", None, []
    return kinds[rest[0]], namespace, rest[1] if len(rest) > 1 else None, rest[2:]


def _openapi_place(group_version: str) -> str:
    return f"apis/{group_version}" if "/" in group_version else f"api/{group_version}"


def _openapi(group_version: str) -> dict[str, Any]:
    """Declare strict validation of writes; kubectl then asks the server for it."""
    group, _, version = group_version.rpartition("/")
    paths: dict[str, Any] = {}
    for plural, kind, namespaced in _GROUPS[group_version]:
        place = "namespaces/{namespace}/" if namespaced else ""
        kinds = {"group": group, "version": version, "kind": kind}
        operation = {
            "parameters": [
                {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}
            ],
            "x-kubernetes-group-version-kind": kinds,
            "x-kubernetes-action": "patch",
            "responses": {"200": {"description": "OK"}},
        }
        path = f"/{_openapi_place(group_version)}/{place}{plural}/{{name}}"
        paths[path] = {"patch": operation}
    info = {"title": "stub", "version": "v1"}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": {}}}


def discovery(parts: list[str]) -> dict[str, Any] | None:
    match parts:
        case ["version"]:
            return {"major": "1", "minor": "32", "gitVersion": "v1.32.0"}
        case ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"]}
        case ["apis"]:
            groups = []
            for group_version in _GROUPS:
                if "/" in group_version:
                    group, version = group_version.split("/")
                    entry = {"groupVersion": group_version, "version": version}
                    groups.append({"name": group, "versions": [entry], "preferredVersion": entry})
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        case ["api", version] | ["apis", _, version] if version:
            name = "v1" if parts[0] == "api" else "/".join(parts[1:])
            if name not in _GROUPS:
                return None
            return {
                "kind": "APIResourceList",
                "groupVersion": name,
                "resources": [
                    {
                        "name": plural, "singularName": kind.lower(), "namespaced": namespaced,
                        "kind": kind,
                        "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
                    }
                    for plural, kind, namespaced in _GROUPS[name]
                ],
            }  # fmt: skip
        case ["openapi", "v3"]:
            places = {name: _openapi_place(name) for name in _GROUPS}
            return {
                "paths": {p: {"serverRelativeURL": f"/openapi/v3/{p}"} for p in places.values()}
            }
        case ["openapi", "v3", *place]:
            name = next(n for n in _GROUPS if _openapi_place(n) == "/".join(place))
            return _openapi(name)
    return None
