"""A sweep file as jobs: one per point, named by what it changes, all on the sweep's cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from k8s.__main__ import main
from k8s.cluster.objects import find
from k8s.submission import sweep as k8s_sweep
from k8s.submission.submit import JobFailed, Patience
from k8s.submission.sweep import render_sweep, run_name, submit_sweep
from pipeline.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    base = tmp_path / "base.yaml"
    base.write_text("student_model: Qwen/Qwen2-1.5B\n")
    return _write(tmp_path / "Temp_1.yaml", base, grid={"temperature": [1, 2], "alpha": [0.5, 1]})


def _write(path: Path, base: Path, **content: Any) -> Path:
    data = {"base": str(base), "cache_dir": "runs/base/cache", **content}
    path.write_text(yaml.safe_dump(data))
    return path


def _config(job: Any) -> dict[str, Any]:
    found = find(job.documents, "ConfigMap")
    assert found is not None
    data: dict[str, Any] = yaml.safe_load(found["data"]["config.yaml"])
    return data


def test_one_job_per_point_on_one_cache(file: Path) -> None:
    jobs = render_sweep(str(file), overlay="local-kind", queue="q")
    configs = [_config(job) for job in jobs]
    assert [(c["loss"]["temperature"], c["loss"]["alpha"]) for c in configs] == [
        (1.0, 0.5), (2.0, 0.5), (1.0, 1.0), (2.0, 1.0),
    ]  # fmt: skip
    volume = jobs[0].volume
    assert {c["cache_dir"] for c in configs} == {f"{volume}/runs/base/cache"}
    folders = {c["output"]["output_dir"] for c in configs}
    assert folders == {f"{volume}/runs/{job.run}/student" for job in jobs}
    assert len({job.name for job in jobs}) == 4
    for job in jobs:
        assert job.job["metadata"]["labels"]["distill/sweep"] == "temp-1"
        assert job.job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
        assert re.fullmatch(r"[a-z0-9-]{1,50}", job.name)


def test_caches_of_a_mixture_are_on_the_volume(file: Path) -> None:
    mixture = [{"url": "runs/a/cache", "weight": 3, "tag": "a"}, {"url": "/fsx/b", "tag": "b"}]
    weights = [mixture, [{**share, "weight": 1} for share in mixture]]
    _write(file, file.parent / "base.yaml", grid={"cache_dir": weights})
    jobs = render_sweep(str(file), overlay="local-kind")
    volume = jobs[0].volume
    found = [[(s["url"], s["weight"]) for s in _config(job)["cache_dir"]] for job in jobs]
    assert [url for url, _ in found[0]] == [f"{volume}/runs/a/cache", "/fsx/b"]
    assert [weight for shares in found for _, weight in shares] == [3, 1, 1, 1]
    assert len({job.name for job in jobs}) == 2


def test_a_long_file_name_is_a_label(file: Path) -> None:
    long = file.with_name(f"{'x' * 62}-and-more.yaml")
    file.rename(long)
    jobs = render_sweep(str(long), overlay="local-kind")
    assert {job.job["metadata"]["labels"]["distill/sweep"] for job in jobs} == {"x" * 62}


def test_a_changed_value_is_the_only_new_job(file: Path) -> None:
    before = {job.name for job in render_sweep(str(file), overlay="local-kind")}
    content = yaml.safe_load(file.read_text())
    content["grid"] = {"alpha": [1, 0.5], "temperature": [2, 4]}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    after = {job.name for job in render_sweep(str(file), overlay="local-kind")}
    assert len(before & after) == 2
    assert len(after - before) == 2


def test_mistakes_and_searches_are_rejected(file: Path) -> None:
    base = file.parent / "base.yaml"
    with pytest.raises(ConfigError) as caught:
        render_sweep(str(_write(file, base, grid={"alpa": [1], "seed": [-1]})), overlay="x")
    assert "unknown field; did you mean alpha?" in str(caught.value)
    assert "seed: found -1" in str(caught.value)
    search = {"space": {"alpha": [0, 1]}}
    with pytest.raises(ConfigError) as caught:
        render_sweep(str(_write(file, base, search=search)), overlay="local-kind")
    assert "a search needs the results of its runs" in str(caught.value)


def test_the_command_prints_every_job(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--overlay", "local-kind", "--sweep", str(file), "--dry-run"]) == 0
    printed = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [item["kind"] for item in printed].count("PyTorchJob") == 4
    with pytest.raises(ConfigError) as caught:
        main(["sweep", "--overlay", "x", "--sweep", str(file), "--", "--alpha", "1"])
    assert "settings of all points under `overrides`" in str(caught.value)


def test_a_failed_job_does_not_stop_the_others(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = render_sweep(str(file), overlay="local-kind", nodes=1)
    begun: list[str] = []
    followed: list[str] = []

    def begin(job: Any, **_: Any) -> bool:
        begun.append(job.name)
        return job is not jobs[0]

    def follow(_kubectl: Any, job: Any, **_: Any) -> None:
        followed.append(job["metadata"]["name"])
        if job is jobs[1].job:
            raise JobFailed("it failed")

    monkeypatch.setattr(k8s_sweep, "begin_stage", begin)
    monkeypatch.setattr(k8s_sweep, "run_to_end", follow)
    with pytest.raises(JobFailed) as caught:
        submit_sweep(jobs, patience=Patience())
    assert begun == [job.name for job in jobs], "all are there before one is waited for"
    assert followed == [job.name for job in jobs[1:]]
    assert "1 of 4 jobs failed:\n  - it failed" in str(caught.value)


@pytest.mark.parametrize("queue", [None, "q"])
def test_worlds_of_several_nodes_need_a_queue_to_run_together(
    file: Path, monkeypatch: pytest.MonkeyPatch, queue: str | None
) -> None:
    """Half-placed, they would hold their nodes and wait for each other's."""
    jobs = render_sweep(str(file), overlay="local-kind", nodes=2, queue=queue)
    events: list[str] = []

    def begin(_job: Any, **_: Any) -> bool:
        events.append("begin")
        return True

    monkeypatch.setattr(k8s_sweep, "begin_stage", begin)
    monkeypatch.setattr(k8s_sweep, "run_to_end", lambda *_, **__: events.append("end"))
    submit_sweep(jobs, patience=Patience())
    together = ["begin"] * 4 + ["end"] * 4
    assert events == (together if queue else ["begin", "end"] * 4)


@given(st.text(max_size=100), st.text("0123456789abcdef", min_size=8, max_size=64))
def test_run_names_fit(words: str, digest: str) -> None:
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", run_name(words, digest))
    assert len(run_name(words, digest)) <= 50 - len("train-student") - len("--12345678")
