"""The two entry points a cluster needs beside the stages: prefetch, and the look at a cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.cache.layout.fold import reopen
from pipeline.storage import Store
from tests.conftest import Stage, Tiny, digests


@pytest.fixture
def configs(tiny: Tiny, tmp_path: Path) -> list[str]:
    """Configurations that name local things, so that no hub is needed."""
    teacher, student = tmp_path / "teacher.yaml", tmp_path / "student.yaml"
    named = {"teacher": {"model": str(tiny.teacher)}, "corpus": {"dataset_name": str(tiny.corpus)}}
    teacher.write_text(yaml.safe_dump(named))
    student.write_text(yaml.safe_dump({"student": {"model": str(tiny.teacher)}}))
    return ["--teacher_config", str(teacher), "--student_config", str(student)]


def test_prefetch_names_what_the_stages_will_find(
    configs: list[str], tiny: Tiny, stage: Stage
) -> None:
    lines = stage("prefetch", configs).ok().out.splitlines()
    assert [line.split()[0] for line in lines] == ["teacher", "data", "student"]
    assert all(str(tiny.teacher) in line for line in (lines[0], lines[2]))


def test_prefetch_refuses_before_it_downloads(
    configs: list[str], stage: Stage, tmp_path: Path
) -> None:
    assert "no configuration is named" in stage("prefetch", []).refused(2)
    (tmp_path / "student.yaml").write_text("student: {modle: x}\n")
    result = stage("prefetch", configs)
    assert "student.modle: unknown field; did you mean student.model?" in result.refused(2)
    assert result.out == ""


def test_prefetch_says_what_it_cannot_reach(
    configs: list[str], stage: Stage, tmp_path: Path
) -> None:
    (tmp_path / "student.yaml").write_text("student: {model: nobody/nothing}\n")
    message = stage("prefetch", configs, env={"HF_HUB_OFFLINE": "1"}).refused(3)
    assert message.startswith("student 'nobody/nothing': cannot be fetched from the hub")
    assert "HF_TOKEN" in message


def test_check_cache(tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path) -> None:
    flags = [*tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", tmp_path / "student"]
    before = digests(tiny_cache)
    said = stage("check_cache", flags).ok().out
    assert said.startswith(f"cache {tiny_cache}: complete, ")
    identity = said.strip().rsplit(" ", 1)[-1]
    stage("check_cache", [*flags, "--cache_identity", identity]).ok()
    message = stage("check_cache", [*flags, "--cache_identity", "0123456789ab"]).refused(3)
    assert f"a cache of identity {identity}; expected 0123456789ab" in message
    message = stage("check_cache", [*flags, "--temperature", "7"]).refused(2)
    assert "loss.temperature: found 7" in message
    assert not (tmp_path / "student").exists()
    assert digests(tiny_cache) == before


def test_check_cache_names_missing_shards(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(tiny_cache, cache)
    reopen(Store(str(cache)), [("train", 0), ("heldout", 0)])
    message = stage("check_cache", [*tiny.stage_two, "--cache_dir", cache]).refused(3)
    assert "2 of" in message
    assert "train-00000" in message
    assert "heldout-00000" in message


def test_check_cache_looks_at_the_checkpoints(
    tiny: Tiny, tiny_cache: Path, tiny_run: Path, stage: Stage
) -> None:
    flags = [*tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", tiny_run]
    stage("check_cache", flags).ok()
    # The same packs a step in a world of two: the same run, which goes on there.
    two = [*flags, "--per_device_train_batch_size", "1", "--world_size", "2"]
    stage("check_cache", two).ok()
    message = stage("check_cache", [*flags, "--world_size", "2"]).refused(3)
    assert "a step of that run, with 1 process, had" in message
    other = [*flags, "--learning_rate", "1e-3"]
    assert "a checkpoint of another run" in stage("check_cache", other).refused(3)
    stage("check_cache", [*other, "--resume_from_checkpoint", "never"]).ok()
