"""What is applied beside the stages' jobs: prefetch, volumes; the label that finds all of it."""

from __future__ import annotations

import pytest
import yaml

from k8s.cluster.objects import main_container, pod_spec
from k8s.rendering.manifests import EXAMPLE_IMAGES
from k8s.rendering.operations import fsx_volume, prefetch_job
from k8s.rendering.render import render_job
from pipeline.errors import ConfigError


def test_prefetch_carries_both_configurations() -> None:
    documents = prefetch_job(
        overlay="hyperpod", secret="my-token", image=EXAMPLE_IMAGES["cache-teacher"],
        teacher_flags=("--teacher_model", "a/b"), student_flags=("--student_model", "c/d"),
    )  # fmt: skip
    config, job = documents
    assert yaml.safe_load(config["data"]["cache-teacher.yaml"])["teacher"]["model"] == "a/b"
    assert yaml.safe_load(config["data"]["train-student.yaml"])["student"]["model"] == "c/d"
    (secret,) = (v["secret"] for v in pod_spec(job)["volumes"] if "secret" in v)
    assert secret["secretName"] == "my-token"
    assert not any("TOKEN" in v["name"] for v in main_container(job)["env"] if "valueFrom" in v)


def test_prefetch_of_what_is_public_needs_no_secret() -> None:
    documents = prefetch_job(
        overlay="hyperpod", secret="none", image=EXAMPLE_IMAGES["cache-teacher"]
    )
    assert "secret" not in str(pod_spec(documents[-1])["volumes"]).lower()
    assert "HF_TOKEN_PATH" not in str(documents)


@pytest.mark.parametrize("overlay", ["hyperpod", "local-kind"])
def test_teardown_finds_everything_by_one_label(overlay: str) -> None:
    image = {"image": EXAMPLE_IMAGES["train-student"]} if overlay == "hyperpod" else {}
    rendered = render_job(stage="train-student", run="exp1", overlay=overlay, **image)
    prefetch = prefetch_job(overlay=overlay, secret="none", image=EXAMPLE_IMAGES["cache-teacher"])
    volumes = fsx_volume(
        overlay="hyperpod", subnet="subnet-0123456789abcdef0",
        security_group="sg-0123456789abcdef0",
    )  # fmt: skip
    for item in [*rendered.documents, *prefetch, *volumes]:
        if item["kind"] not in ("Namespace",) and item["metadata"]["name"] != "fsx-claim":
            labels = item["metadata"].get("labels") or {}
            assert labels.get("app.kubernetes.io/part-of") == "offline-distill", item["metadata"]


@pytest.mark.parametrize("secret", ["", "Hub Token", "hf_abc"])
def test_prefetch_without_a_secrets_name(secret: str) -> None:
    with pytest.raises(ConfigError, match=r"not the name of a Secret; expected the one that holds"):
        prefetch_job(overlay="local-kind", secret=secret)


def test_the_volume_is_filled_in() -> None:
    volume, claim = fsx_volume(
        overlay="hyperpod", file_system="fs-0123456789abcdef0", mount_name="abcdefgh",
        region="eu-west-1", storage="4800Gi",
    )  # fmt: skip
    assert volume["metadata"]["name"] == claim["spec"]["volumeName"]
    assert volume["spec"]["csi"]["volumeAttributes"] == {
        "dnsname": "fs-0123456789abcdef0.fsx.eu-west-1.amazonaws.com", "mountname": "abcdefgh",
    }  # fmt: skip
    assert claim["metadata"]["namespace"] == "hyperpod-ns-distill"
    new = fsx_volume(overlay="hyperpod", subnet="subnet-0123456789abcdef0",
                     security_group="sg-0123456789abcdef0")  # fmt: skip
    assert {item["kind"] for item in new} == {"StorageClass", "PersistentVolumeClaim"}
    fast = fsx_volume(
        overlay="hyperpod", subnet="subnet-0123456789abcdef0",
        security_group="sg-0123456789abcdef0", throughput=1000, efa=True,
    )  # fmt: skip
    parameters = next(item for item in fast if item["kind"] == "StorageClass")["parameters"]
    assert parameters["perUnitStorageThroughput"] == "1000"
    assert parameters["efaEnabled"] == "true"
    with pytest.raises(ConfigError, match="THROUGHPUT: found 300; expected 125, 250, 500 or 1000"):
        fsx_volume(overlay="hyperpod", throughput=300, subnet="subnet-0123456789abcdef0",
                   security_group="sg-0123456789abcdef0")  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [{}, {"file_system": "fs-0123456789abcdef0"}, {"subnet": "subnet-0123456789abcdef0"},
     {"file_system": "x", "mount_name": "abc", "region": "us-west-2"}],
)  # fmt: skip
def test_half_a_volume(values: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        fsx_volume(overlay="hyperpod", **values)
