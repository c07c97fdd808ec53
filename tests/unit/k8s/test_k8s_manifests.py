"""Everything in k8s/ and docker/ passes; the linters and the checks can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from k8s.__main__ import main
from k8s.cluster.kubectl import render_kustomization
from k8s.cluster.objects import ROOT, find_job, pod_spec
from k8s.rendering import manifests
from pipeline.errors import ConfigError


@pytest.mark.timeout(600)
def test_every_manifest(capfd: pytest.CaptureFixture[str]) -> None:
    manifests.check_everything()
    output = capfd.readouterr().out
    for name in ("local-kind", "hyperpod", "ml.p6-b300.48xlarge", "kueue", "katib"):
        assert name in output


def test_the_linters_find_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker/a.Dockerfile").write_text("FROM debian\nRUN cd /x && sudo ls\n")
    (tmp_path / "docker/a.sh").write_text("#!/bin/bash\necho $1\n")
    folder = tmp_path / "k8s"
    folder.mkdir()
    (folder / "a.yaml").write_text("a:   {b: 1 }\n")
    (folder / ".yamllint").write_text((ROOT / ".yamllint").read_text())
    monkeypatch.setattr(manifests, "ROOT", folder)
    with pytest.raises(ConfigError) as caught:
        manifests.lint()
    for name in ("hadolint: ", "shellcheck: ", "yamllint: "):
        assert name in str(caught.value)


def test_the_student_as_a_katib_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["katib"]) == 0
    *_, experiment = yaml.safe_load_all(capsys.readouterr().out)
    assert experiment["kind"] == "Experiment"
    trial = experiment["spec"]["trialTemplate"]["trialSpec"]
    assert trial["kind"] == "PyTorchJob"
    assert "--loss.alpha=${trialParameters.alpha}" in str(trial)


@pytest.mark.parametrize("overlay", ["local-kind", "hyperpod"])
def test_patches_keep_what_the_base_has(overlay: str) -> None:
    """Without merge keys for the custom resource, a patch of a list would have replaced it."""
    base = render_kustomization(ROOT / "base")
    ours = render_kustomization(ROOT / "overlays" / overlay)
    for stage in ("cache-teacher", "train-student"):
        specs = [pod_spec(find_job(docs, stage, source="")) for docs in (base, ours)]
        (before,), (after,) = (spec["containers"] for spec in specs)
        names = [{item["name"] for item in found["env"]} for found in (before, after)]
        assert names[0] <= names[1]
        assert after["volumeMounts"] == before["volumeMounts"]
        assert after["args"] == before["args"]
        assert {v["name"] for v in specs[0]["volumes"]} == {v["name"] for v in specs[1]["volumes"]}


def test_an_overlay_of_ones_own_in_a_queue() -> None:
    documents = render_kustomization(ROOT / "examples/kueue")
    for stage in ("cache-teacher", "train-student"):
        metadata = find_job(documents, stage, source="")["metadata"]
        assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "hyperpod-ns-research-localqueue"
        assert metadata["labels"]["kueue.x-k8s.io/priority-class"] == "training-priority"
        assert metadata["namespace"] == "hyperpod-ns-research"
