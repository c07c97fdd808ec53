"""Several workers on one cache: killed, paused, on a failing store; the bytes are one worker's."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.teacher.claims import CLAIMS
from tests.conftest import Stage, Tiny, digests
from tests.stage_runner import Running

LEASE = ["--capture.lease_s", "1.5"]


def _same_cache(folder: Path, other: Path) -> None:
    """Compare every file; the folder's own name stands in two texts."""

    def content(root: Path) -> dict[str, str]:
        found = digests(root)
        for name in ("README.md", "_meta/config.yaml"):
            del found[name]
        return found

    assert content(folder) == content(other)


def test_three_workers_share_the_shards(
    tiny: Tiny, tiny_cache: Path, start: Callable[..., Running], tmp_path: Path
) -> None:
    flags = [*tiny.stage_one, *LEASE, "--cache_dir", tmp_path / "cache"]
    workers = [start("cache_teacher", flags) for _ in range(3)]
    for worker in workers:
        worker.wait().ok()
    _same_cache(tmp_path / "cache", tiny_cache)
    assert not list((tmp_path / "cache" / CLAIMS).glob("*"))


def test_a_paused_worker_is_overtaken_and_wakes_to_no_harm(
    tiny: Tiny, tiny_cache: Path, start: Callable[..., Running], tmp_path: Path
) -> None:
    flags = [*tiny.stage_one, *LEASE, "--cache_dir", tmp_path / "cache"]
    paused = start("cache_teacher", flags)
    end = time.monotonic() + 60
    while not list((tmp_path / "cache" / CLAIMS).glob("*.json")):
        assert time.monotonic() < end
        time.sleep(0.001)
    os.kill(paused.process.pid, signal.SIGSTOP)
    start("cache_teacher", flags).wait().ok()
    os.kill(paused.process.pid, signal.SIGCONT)
    paused.wait().ok()
    _same_cache(tmp_path / "cache", tiny_cache)


@pytest.mark.slow
def test_killed_twenty_times_over_and_still_one_workers_bytes(
    tiny: Tiny, tiny_cache: Path, start: Callable[..., Running], stage: Stage, tmp_path: Path
) -> None:
    draw = random.Random(11)
    flags = [*tiny.stage_one, *LEASE, "--cache_dir", tmp_path / "cache"]
    workers = [start("cache_teacher", flags) for _ in range(3)]
    kills = 0
    while kills < 20:
        time.sleep(draw.uniform(0.05, 0.8))
        victim = draw.randrange(3)
        with contextlib.suppress(ProcessLookupError):
            os.kill(workers[victim].process.pid, signal.SIGKILL)
        workers[victim].process.join()
        kills += 1
        workers[victim] = start("cache_teacher", flags)
    for worker in workers:
        worker.wait().ok()
    stage("cache_teacher", flags).ok()  # checks every checksum
    _same_cache(tmp_path / "cache", tiny_cache)
    assert not list((tmp_path / "cache" / CLAIMS).glob("*"))
