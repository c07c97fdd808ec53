"""Workers of a job load their teacher one after the other, within a bound, once a pod."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.teacher.fleet.turns import LONGEST_WAIT_S, load_delay_s, wait_for_turn


def test_turns_are_spaced_and_bounded() -> None:
    assert [load_delay_s(str(index), 1.6) for index in (0, 1, 8)] == pytest.approx([0, 1.6, 12.8])
    assert load_delay_s("9999", 60) == LONGEST_WAIT_S
    assert load_delay_s(None, 60) == load_delay_s("7", 0) == 0


def test_a_pod_waits_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setenv("DISTILL_REPLICA_INDEX", "3")
    for _ in range(2):  # the container is restarted
        wait_for_turn(2.0, folder=tmp_path, sleep=slept.append)
    assert slept == [6.0]
    monkeypatch.delenv("DISTILL_REPLICA_INDEX")
    wait_for_turn(2.0, folder=tmp_path / "other", sleep=slept.append)
    assert slept == [6.0]
