"""Teardown: nothing of the project is left, and data goes only where its file system is named."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from k8s.cluster.kubectl import Kubectl
from k8s.cluster.workloads import PROJECT_LABEL
from k8s.submission.teardown import teardown
from pipeline.errors import DistillError
from tests.cluster.api_stub import ApiStub
from tests.cluster.job_ends import ends, one_error

Object = dict[str, Any]
FILE_SYSTEM = "fs-0123456789abcdef0"
OURS = dict([PROJECT_LABEL.split("=")])


def _put_volume(api: ApiStub, *, made: bool, policy: str = "Retain") -> None:
    annotations = {"pv.kubernetes.io/provisioned-by": "fsx.csi.aws.com"} if made else {}
    for kind, namespace, name, spec in (
        ("PersistentVolumeClaim", "distill", "fsx-claim",
         {"volumeName": "pv-1", "storageClassName": "distill-fsx" if made else ""}),
        ("PersistentVolume", "", "pv-1",
         {"persistentVolumeReclaimPolicy": policy, "csi": {"volumeHandle": FILE_SYSTEM}}),
    ):  # fmt: skip
        metadata: Object = {"name": name, "annotations": annotations}
        if namespace:
            metadata["namespace"] = namespace
        api.put({"apiVersion": "v1", "kind": kind, "metadata": metadata, "spec": spec})
    head = {"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass"}
    api.put({**head, "metadata": {"name": "distill-fsx"}, "provisioner": "fsx.csi.aws.com"})


def _kinds(api: ApiStub) -> set[str]:
    return {kind for kind, _, _ in api.objects} - {"Namespace", "Pod"}


def _teardown(**more: Any) -> None:
    teardown("distill", secret="hub-token", **{"data": None, "yes": True, **more})


@pytest.mark.slow
def test_nothing_is_left_but_the_file_system(api: ApiStub, call: Any) -> None:
    api.scripts["PyTorchJob"] = ends("Succeeded")
    assert call("cache-teacher", "--overlay", "local-kind", "--run", "a", "--poll_s", "1")[0] == 0
    _put_volume(api, made=True)
    metadata = {"name": "hub-token", "namespace": "distill"}
    api.put({"apiVersion": "v1", "kind": "Secret", "metadata": metadata})
    metadata = {"name": "not-ours", "namespace": "distill"}
    api.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})
    before = dict(api.objects)
    place = ("teardown", "--overlay", "local-kind")
    # Nobody is there to say yes; and a dry run says what there is.
    code, _, err = call(*place)
    assert (code, "nothing was deleted" in one_error(err)) == (1, True)
    assert "volume pv-1 (fs-0123456789abcdef0)" in call(*place, "--dry-run")[1]
    assert api.objects == before
    code, out, err = call(*place, "--yes", "true")
    assert (code, err) == (0, "")
    assert f"kept: file system {FILE_SYSTEM} and its data" in out
    assert _kinds(api) == {"ConfigMap"}
    assert api.get("ConfigMap", "not-ours") is not None
    assert "nothing of this project is in namespace distill" in call(*place)[1]


def test_data_goes_where_its_file_system_is_named(api: ApiStub) -> None:
    """The driver deletes what it has made, once the volume's policy says so."""
    _put_volume(api, made=True)
    _teardown(ask=lambda question: FILE_SYSTEM if "Type fs-" in question else "n")
    volume = api.get("PersistentVolume", "pv-1")
    assert volume is not None  # its controller deletes it, and with it the file system
    assert volume["spec"]["persistentVolumeReclaimPolicy"] == "Delete"
    assert _kinds(api) == {"PersistentVolume"}


@pytest.mark.parametrize("data", [None, "fs-other", FILE_SYSTEM])
def test_a_file_system_from_elsewhere_is_never_deleted(api: ApiStub, data: str | None) -> None:
    _put_volume(api, made=False)
    _teardown(data=data)
    assert _kinds(api) == set()  # a volume with `Retain` is only the cluster's record of it


def test_a_dry_run_deletes_nothing_though_all_was_agreed_to(
    api: ApiStub, capsys: pytest.CaptureFixture[str]
) -> None:
    _put_volume(api, made=True)
    before = dict(api.objects)
    _teardown(dry=True, data=FILE_SYSTEM)
    assert f"volume pv-1 ({FILE_SYSTEM})" in capsys.readouterr().out
    assert api.objects == before


def test_a_volume_that_ends_with_its_claim_stays(
    api: ApiStub, capsys: pytest.CaptureFixture[str]
) -> None:
    _put_volume(api, made=True, policy="Delete")
    _teardown(data="yes")
    assert _kinds(api) == {"PersistentVolume", "PersistentVolumeClaim", "StorageClass"}
    assert "whose deletion would delete its data" in capsys.readouterr().out
    _teardown(data=FILE_SYSTEM)
    assert _kinds(api) == {"PersistentVolume"}


@pytest.mark.parametrize("refused", [("get",), ("delete",)])
def test_where_volumes_are_not_ours_to_delete_the_rest_goes(
    refused: tuple[str, ...], api: ApiStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A namespace's admin may read or delete no volume; the claim stays, by which it is found."""
    _put_volume(api, made=False)
    metadata = {"name": "ours", "namespace": "distill", "labels": OURS}
    real = Kubectl.run

    def run(self: Kubectl, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        if "persistentvolume" in words and words[0] in refused:
            return subprocess.CompletedProcess(words, 1, "", "Forbidden")
        return real(self, *words, **options)

    monkeypatch.setattr(Kubectl, "run", run)
    api.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})
    with pytest.raises(DistillError, match="Forbidden"):
        _teardown()
    assert {"PersistentVolume", "PersistentVolumeClaim"} <= _kinds(api)
    assert api.get("ConfigMap", "ours") is None
    monkeypatch.setattr(Kubectl, "run", real)
    _teardown()
    assert _kinds(api) == set()
