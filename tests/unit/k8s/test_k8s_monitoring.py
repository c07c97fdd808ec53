"""The dashboard asks for metrics that the stages serve, from pods that open the port."""

from __future__ import annotations

import json
import re

from k8s.checks.schema import schema_mistakes
from k8s.cluster.kubectl import render_kustomization
from k8s.cluster.objects import ROOT, main_container, replica_specs
from k8s.rendering.manifests import EXAMPLE_IMAGES
from k8s.rendering.render import render_job
from k8s.rendering.run_config import STAGES
from pipeline.observe.prometheus import _HELP, gauge_name
from pipeline.student.metric_names import DISTANCES

_PREFIXES = ("train/", "throughput/", "data/", "memory/", "heldout/")


def _served() -> set[str]:
    """Return the names that the endpoints have, as the stages' sources write them."""
    names = {"distill_step", "distill_time_seconds_total", "distill_wall_seconds_total"}
    names |= {"process_resident_memory_bytes", "process_start_time_seconds"}
    for name in _HELP:
        level = name.startswith(("planned_", "recorded_"))
        names |= {f"distill_{name}"} if level else {f"distill_{name}_per_second"}
    folder = ROOT.parent / "pipeline/student/training"
    sources = "".join(file.read_text() for file in folder.rglob("*.py"))
    keys = re.findall(r'"([a-z]+/[a-z0-9_]+)"', sources)
    names |= {gauge_name(key) for key in keys if key.startswith(_PREFIXES)}
    return names | {gauge_name(f"heldout/{distance}") for distance in DISTANCES}


def test_the_dashboard_shows_what_is_served() -> None:
    dashboard = json.loads((ROOT / "ops/monitoring/dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"]]
    asked = set(re.findall(r"\b(?:distill|process)_[a-z0-9_]+\b", " ".join(queries)))
    asked -= {"distill_run"}  # a label
    assert len(asked) > 10
    assert asked <= _served()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_monitors_find_the_pods_and_their_port() -> None:
    monitors = render_kustomization(ROOT / "ops/monitoring")
    assert [item["kind"] for item in monitors] == ["PodMonitor"] * 2
    for stage, monitor in zip(STAGES, monitors, strict=True):
        job = render_job(
            stage=stage, run="r", overlay="hyperpod", image=EXAMPLE_IMAGES[stage], flags=[]
        )
        labels = replica_specs(job.job)["Worker"]["template"]["metadata"]["labels"]
        assert labels.items() >= monitor["spec"]["selector"]["matchLabels"].items()
        assert set(monitor["spec"]["podTargetLabels"]) <= set(labels)
        (port,) = main_container(job.job)["ports"]
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] == port["name"]
        observe = job.settings.observe  # type: ignore[attr-defined]
        assert (observe.prometheus_port, observe.prometheus_host) == (9464, "0.0.0.0")
        assert schema_mistakes(monitor) == []
        monitor["spec"]["podMetricsEndpoint"] = []
        assert "spec.podMetricsEndpoint: unknown field" in schema_mistakes(monitor)[0]


def test_an_endpoint_of_ones_own_or_none_is_kept() -> None:
    for given in (0, 9000):
        job = render_job(
            stage="train-student", run="r", overlay="hyperpod",
            image=EXAMPLE_IMAGES["train-student"],
            flags=["--observe.prometheus_port", str(given)],
        )  # fmt: skip
        assert job.settings.observe.prometheus_port == given  # type: ignore[attr-defined]
    local = render_job(stage="train-student", run="r", overlay="local-kind")
    assert local.settings.observe.prometheus_port is None  # type: ignore[attr-defined]
