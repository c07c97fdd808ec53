"""The pods of a teacher that spans nodes: who leads, who lends GPUs, and how each of them ends."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import ConfigError, EngineStalled, ModelError
from stages import teacher_group
from stages.teacher_group import Place, follow, lead, place_of

FOLLOWER = Place(rank=1, nodes=2, head="job-worker-2", address="10.0.0.4")


def _variables(index: int) -> dict[str, str]:
    return {
        "DISTILL_GROUP_NODES": "2", "DISTILL_REPLICA_INDEX": str(index), "DISTILL_JOB": "job",
        "VLLM_HOST_IP": "10.0.0.4",
    }  # fmt: skip


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in of Ray's program; returns the file with what it was called with."""
    calls, program = tmp_path / "calls", tmp_path / "ray"
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(teacher_group, "_RAY", (str(program), "start"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


def test_groups_are_formed_by_the_index() -> None:
    places = [place_of(_variables(index)) for index in range(4)]
    assert [(place.rank, place.head) for place in places] == [
        (0, "job-worker-0"), (1, "job-worker-0"), (0, "job-worker-2"), (1, "job-worker-2"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="'DISTILL_JOB': not in the environment"):
        place_of({"DISTILL_GROUP_NODES": "2", "DISTILL_REPLICA_INDEX": "0"})


def test_the_first_pod_runs_stage_one_beside_rays_head(ray: Path) -> None:
    seen: list[str] = []

    def stage() -> int:
        seen.append(os.environ["RAY_ADDRESS"])
        return 5

    assert lead(place_of(_variables(2)), stage) == 5
    assert seen == ["10.0.0.4:6379"]
    assert "--head --port=6379 --node-ip-address=10.0.0.4" in ray.read_text()


@pytest.mark.parametrize(("alive", "raised"), [(1, EngineStalled), (2, ModelError)])
def test_a_missing_node_is_no_mistake_of_the_model(
    alive: int, raised: Any, ray: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one is tried again, the other ends the job for good."""
    nodes = [{"Alive": number < alive} for number in range(3)]
    fake = SimpleNamespace(is_initialized=lambda: True, nodes=lambda: nodes)
    monkeypatch.setitem(sys.modules, "ray", fake)  # type: ignore[arg-type]

    def stage() -> int:
        raise ModelError("vLLM cannot run it")

    with pytest.raises(raised, match="vLLM cannot run it"):
        lead(place_of(_variables(0)), stage)


def test_a_follower_lends_its_node_until_the_cache_is_complete(ray: Path) -> None:
    """The head starts, dies, starts again, and ends with the cache complete."""
    slept: list[float] = []
    heads = iter([False, True, False, True])
    code = follow(
        FOLLOWER,
        # Complete from the second start on: a head that is there counts more.
        lambda: len(ray.read_text().splitlines()) == 2 if ray.exists() else False,
        is_there=lambda host: host == "job-worker-2" and next(heads, False),
        sleep=slept.append,
    )
    assert code == 0
    calls = ray.read_text().splitlines()
    assert calls == ["start --address=job-worker-2:6379 --node-ip-address=10.0.0.4 --block"] * 2
    assert 60 <= sum(slept) < 80  # it is not gone while a head may only be on its way back
