"""A dead, stalled or missing rank ends the others with a message, not a hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Tiny
from tests.ranks import free_port, start_ranks
from tests.stage_runner import Running

Start = Callable[..., Running]


@pytest.fixture
def flags(tiny: Tiny, tiny_cache: Path, tmp_path: Path) -> list[Any]:
    return [
        *tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", tmp_path / "student",
        "--train.evaluate_before", "false",
    ]  # fmt: skip


@pytest.mark.parametrize("zero", [2, 3])
def test_a_killed_rank(zero: int, flags: list[Any], start: Start, tmp_path: Path) -> None:
    more = [*flags, "--train.timeout_s", "60", "--train.zero_stage", zero]
    kill = ("signal_at_step", 5, int(signal.SIGKILL))
    survivor, dead = start_ranks(start, 2, more, hooks={1: kill})
    assert dead.wait().code == -signal.SIGKILL
    died = time.monotonic()
    message = survivor.wait().refused(1)
    assert time.monotonic() - died < 30, "long before the timeout: its connection is gone"
    assert message.startswith("rank 0 lost another rank (")
    assert "run the same command again; it goes on from the last complete checkpoint" in message
    saved = tmp_path / "student/checkpoints"
    assert [path.parent.name for path in saved.glob("*/complete.json")] == ["step-00000004"]


@pytest.mark.slow
def test_a_stalled_rank(flags: list[Any], start: Start) -> None:
    # Long enough for two ranks to start on a busy machine, and to meet.
    more = [*flags, "--train.timeout_s", "25"]
    stop = ("signal_at_step", 3, int(signal.SIGSTOP))
    survivor, stalled = start_ranks(start, 2, more, hooks={1: stop})
    try:
        assert survivor.wait(150).refused(1).startswith("rank 0 lost another rank (")
    finally:
        os.kill(stalled.process.pid, signal.SIGKILL)
        stalled.process.join()


@pytest.mark.parametrize("rank", [0, 1])
def test_nobody_else_comes(rank: int, flags: list[Any], start: Start) -> None:
    port = free_port()
    env = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    alone = start("train_student", [*flags, "--train.timeout_s", "5"], env=env)
    message = alone.wait(60).refused(1)
    assert message.startswith(
        f"rank {rank} of 2 did not meet the others at 127.0.0.1:{port} within 5 s ("
    )
    assert "check that all ranks were started and can reach that address" in message
