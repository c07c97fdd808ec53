"""A teacher that hangs: its lease beats no more, its process ends; one that is slow goes on."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EngineStalled
from pipeline.storage import Store
from pipeline.teacher.fleet.leases import LeaseBoard
from pipeline.teacher.fleet.pulse import Pulse, WatchedEngine
from tests.stage_runner import ROOT
from tests.unit.teacher.captured import Engine, shards_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watched(tmp_path: Path) -> tuple[Pulse, Clock, list[EngineStalled], Path]:
    clock, ends, file = Clock(), list[EngineStalled](), tmp_path / "pulse"
    return Pulse(10.0, file=str(file), clock=clock, end=ends.append), clock, ends, file


def test_tokens_keep_a_slow_teacher_alive(watched: Any) -> None:
    pulse, clock, ends, file = watched
    with pulse.expecting():
        for _ in range(5):
            clock.now += 9
            pulse.look()
            pulse.advance()
    assert not ends
    assert file.exists()


def test_a_teacher_without_tokens_ends_its_process(watched: Any) -> None:
    pulse, clock, ends, file = watched
    with pulse.expecting():
        clock.now += 10
        assert not pulse.is_alive
        pulse.look()
    assert not file.exists()
    (error,) = ends
    assert error.exit_code == 6
    assert "has finished no token for 10 s" in str(error)
    assert "--teacher.stall_s" in str(error)


def test_loading_takes_longer_and_waiting_as_long_as_it_likes(watched: Any) -> None:
    pulse, clock, ends, _ = watched
    with pulse.expecting(loading=True):
        clock.now += 59
        pulse.look()
    clock.now += 1000  # all shards are other workers'
    pulse.look()
    assert not ends
    with pulse.expecting(loading=True):
        clock.now += 60
        pulse.look()
    assert "is not loaded" in str(ends[0])


def test_a_heart_beats_while_there_is_a_pulse(tmp_path: Path) -> None:
    alive = [True]
    store = Store(str(tmp_path))
    board = LeaseBoard(store, "w", 0.05, is_alive=lambda: alive[0])
    other = LeaseBoard(store, "o", 0.05, is_dead=lambda _: False)
    lease = board.try_lease("train-00000", None)
    assert lease is not None

    def taken_within(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if other.try_lease("train-00000", other.attempts()["train-00000"]) is not None:
                return True
            time.sleep(0.005)
        return False

    with board.beating():
        board.lease_s = 0.01  # beats five times as often as the other's lease asks
        assert not taken_within(0.3)
        alive[0] = False
        assert taken_within(10)


def test_an_engines_steps_count_though_they_finish_nothing() -> None:
    clock = Clock()
    pulse = Pulse(10.0, clock=clock)
    reported: list[int] = []

    class Steps(Engine):
        def capture(self, requests: Any, *, on_tokens: Any = None) -> Any:
            for _ in range(3):
                clock.now += 8
                assert pulse.is_alive
                on_tokens(0)
            return super().capture(requests, on_tokens=on_tokens)

    engine = WatchedEngine(Steps(), pulse)
    engine.capture(shards_of(1)[0].requests(), on_tokens=reported.append)
    assert reported == [30]
    engine.capture(shards_of(1)[0].requests())


HANGS = """
import time
from pipeline.teacher.fleet.pulse import Pulse
with Pulse(0.2) as pulse, pulse.expecting():
    time.sleep(60)  # as a kernel that never returns
"""


def test_a_call_that_hangs_ends_with_its_own_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 6
    assert done.stderr.count("error: the teacher has finished no token") == 1
    assert "Traceback" not in done.stderr
