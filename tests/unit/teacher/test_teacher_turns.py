"""The nodes of a job load their teacher spread over a time, each at its own, once a pod."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.teacher.fleet.turns import NODE, load_delay_s, wait_for_turn


def test_nodes_are_spread_evenly() -> None:
    delays = sorted(load_delay_s(f"ip-10-1-{number}-7.ec2.internal", 840) for number in range(64))
    assert load_delay_s("ip-10-1-3-7.ec2.internal", 840) in delays  # the same each time
    assert delays[0] >= 0
    assert delays[-1] < 840
    # No quarter of the time has more than half of the nodes.
    counts = [sum(start <= delay < start + 210 for delay in delays) for start in range(0, 840, 210)]
    assert max(counts) <= 32
    assert load_delay_s(None, 840) == load_delay_s("a", 0) == 0


def test_a_pod_waits_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setenv(NODE, "a")
    for _ in range(2):  # the container is restarted
        wait_for_turn(2.0, folder=tmp_path, sleep=slept.append)
    assert slept == [load_delay_s("a", 2.0)]
    monkeypatch.delenv(NODE)
    wait_for_turn(2.0, folder=tmp_path / "other", sleep=slept.append)
    assert len(slept) == 1
