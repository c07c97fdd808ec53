"""What a run and a cache left, under the names and words of the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cache.layout.manifest import total_of
from pipeline.errors import ResumeError
from pipeline.observe.metrics import JsonLinesSink, MetricRecord
from pipeline.report.compose.cache import cache_facts, kl_is_bucketed
from pipeline.report.compose.curves import (
    curves_of,
    shared_axis,
    speeds_of,
    started_alike,
)
from pipeline.report.compose.measures import (
    before_rows,
    comparable,
    measured_notes,
    paired_differences,
    row_of,
)
from pipeline.report.compose.runs import Run, RunFolder, read_run
from pipeline.report.compose.settings import setting_differences
from pipeline.sampling.inclusion import InclusionRule


def _folder(root: Path, name: str, *, kl: float, temperature: float = 1.0) -> RunFolder:
    folder = root / name
    folder.mkdir()
    scores = {
        "sample_ids": ["a", "b", "c"],
        "loss_tokens": [10, 20, 30],
        "sums": {"kl": [10 * kl, 21 * kl, 29 * kl], "cross_entropy": [20.0, 41.0, 59.0]},
        "confidence_bins": [],
    }
    (folder / "heldout-after.json").write_text(json.dumps(scores))
    (folder / "config.yaml").write_text(
        f"loss:\n  temperature: {temperature}\noutput:\n  output_dir: {name}\n"
    )
    sink = JsonLinesSink(folder / "metrics.jsonl")
    for step in range(1, 4):
        sink.log(
            step,
            {
                "train/loss": 1.0 / step,
                "train/kl": 0.5 / step,
                "train/tokens": 100.0,
                "throughput/tokens_per_s": 10.0 * step,
                "data/wait_s": 1.0,
            },
        )
    sink.log(3, {"heldout/kl": 0.5})
    sink.close()
    return RunFolder(name, "control", folder)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(_folder(tmp_path, "one", kl=0.5), bucketed=True)


def test_curves_of_a_run_say_what_their_kl_is_over(run: Run, tmp_path: Path) -> None:
    curves = curves_of(run.metrics, run.folder)
    assert [(c.name, c.group, len(c.points)) for c in curves] == [
        ("training loss", "learning", 3),
        ("training bucketed KL", "learning", 3),
        ("held-out bucketed KL", "learning", 1),
        ("tokens per second", "speed", 3),
        ("waiting for data", "speed", 3),
    ]
    assert curves[2].points == ((3, 0.5),)
    assert {c.kind for c in curves} == {"control"}
    sampled = read_run(run.folder, bucketed=False)
    names = [curve.name for curve in curves_of(sampled.metrics, sampled.folder)]
    assert names[1:3] == ["training KL", "held-out KL"]


def test_curves_are_over_tokens_where_every_run_logged_them(run: Run, tmp_path: Path) -> None:
    assert shared_axis([run]) == "step"
    told = MetricRecord(0, {"heldout/kl": 2.0, "heldout/cross_entropy": 5.0})
    steps = [
        MetricRecord(step, {"train/total_tokens": 90.0 * step, "train/kl": 1.0 / step})
        for step in (1, 2, 3)
    ]
    ends = [MetricRecord(3, {"heldout/kl": 1.0, "heldout/cross_entropy": 4.0})]
    first = replace(run, metrics=(told, *steps, *ends))
    assert shared_axis([first]) == "tokens"
    assert shared_axis([first, run]) == "step", "one axis for all"
    found = {curve.name: curve for curve in curves_of(first.metrics, first.folder, over="tokens")}
    assert found["held-out KL"].points == ((0, 2.0), (270, 1.0))
    assert found["held-out cross-entropy"].points == ((0, 5.0), (270, 4.0))
    assert [tokens for tokens, _ in found["training KL"].points] == [90, 180, 270]
    assert {curve.over for curve in found.values()} == {"tokens"}
    speeds = curves_of(run.metrics, run.folder, over="tokens")
    assert {curve.over for curve in speeds if curve.group == "speed"} == {"step"}


def test_a_control_starts_where_the_distilled_student_does(run: Run) -> None:
    start = MetricRecord(0, {"heldout/kl": 2.0})
    first = replace(run, metrics=(start, *run.metrics))
    assert started_alike(first, run)[0] == start
    assert started_alike(first, first) == first.metrics, "it has a start of its own"
    other = replace(run, folder=replace(run.folder, kind="distilled"))
    assert started_alike(first, other) == run.metrics, "another run may start elsewhere"


def test_measures_of_a_run_and_their_differences(run: Run, tmp_path: Path) -> None:
    row = row_of(run)
    assert list(row.metrics) == ["kl_bucketed", "cross_entropy", "perplexity"]
    assert row.metrics["kl_bucketed"].value == pytest.approx(0.5)
    assert before_rows(run, "before", "", None) == ()
    other = read_run(_folder(tmp_path, "two", kl=0.8, temperature=2.0), bucketed=True)
    found = paired_differences("two", other.after, "one", run.after)
    assert [d.metric for d in found] == ["kl_bucketed", "cross_entropy"]
    assert found[0].value == pytest.approx(0.3)
    (differs,) = setting_differences([run, other])
    assert (differs.field, differs.values_by_run) == (
        "loss.temperature", {"one": "1.0", "two": "2.0"},
    )  # fmt: skip


def test_the_speed_is_the_median_and_the_wait_a_share(run: Run) -> None:
    (speed,) = speeds_of([run])
    assert (speed.steps, speed.tokens, speed.tokens_per_s) == (3, 300, 20.0)
    assert speed.wait_share == pytest.approx(3.0 / (100 / 10 + 100 / 20 + 100 / 30))


def test_the_speed_on_a_gpu_is_told_too(run: Run) -> None:
    (plain,) = speeds_of([run])
    assert (plain.mfu, plain.device_peak_gib, plain.skipped_updates) == (None, None, None)
    more = {
        "throughput/tokens_per_s_per_device": 2.5, "throughput/mfu": 0.41,
        "memory/device_peak_gib": 70.5, "train/skipped_updates": 3.0,
    }  # fmt: skip
    first, *others = run.metrics
    told = replace(run, metrics=(replace(first, values={**first.values, **more}), *others))
    (speed,) = speeds_of([told])
    assert (speed.tokens_per_s_per_device, speed.mfu) == (2.5, 0.41)
    assert (speed.device_peak_gib, speed.skipped_updates) == (70.5, 3)


def test_a_run_that_was_never_evaluated(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "unmeasured"
    folder.mkdir()
    (folder / "finished.json").write_text("{}")
    other = read_run(RunFolder("unmeasured", "distilled", folder, "said"), bucketed=True)
    assert other.after is None
    row = row_of(other)
    assert (row.metrics, row.detail) == ({}, "said, not measured")
    assert not paired_differences("one", run.after, "unmeasured", other.after)
    assert not comparable(run.after, other.after)
    notes = measured_notes([run, other], bucketed=True)
    assert "lower bound" in notes[0]
    assert notes[1:] == ("Not measured on held-out text (train.evaluate never): unmeasured.",)
    assert len(measured_notes([other], bucketed=True)) == 1
    assert len(measured_notes([run], bucketed=True)) == 1


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"no heldout-after\.json; expected a finished run"):
        read_run(RunFolder("x", "distilled", tmp_path), bucketed=False)


@pytest.mark.parametrize(
    ("scheme", "bucketed", "words"),
    [
        ({"name": "top-k", "top_k": 64}, True, "top-64 with the mass of the rest"),
        (
            {"name": "top-k", "top_k": 64, "heldout": {"top_k": 64, "taus": [0.1]}},
            False,
            "top-64 with the mass of the rest; held out: top-64 and a sample of the rest, tau 0.1",
        ),
        (
            {"name": "top-k-sampled", "top_k": 8, "taus": [0.1]},
            False,
            "top-8 and a sample of the rest, tau 0.1",
        ),
        (
            {"name": "threshold", "taus": [0.01, 0.002]},
            False,
            "the largest entries and a sample of the rest, tau 0.01, 0.002",
        ),
    ],
)
def test_the_scheme_of_a_cache_says_what_its_kl_is_over(
    scheme: dict[str, Any], bucketed: bool, words: str
) -> None:
    identity = {
        "teacher": {"model": "t", "revision": "r"}, "corpus": {"source": "c"}, "scheme": scheme,
    }  # fmt: skip
    manifest = SimpleNamespace(
        identity=identity, total=lambda: total_of(()), identity_digest="d", temperatures=(1.0,)
    )
    sampled = "taus" in scheme.get("heldout", scheme)
    rule = InclusionRule((1.0,), (0.1,)) if sampled else None
    cache: Any = SimpleNamespace(manifest=manifest, records=lambda: (), heldout_rule=rule)
    assert kl_is_bucketed(cache) is bucketed
    assert cache_facts(cache).scheme == words
