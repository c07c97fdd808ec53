"""Several workers on one cache: killed, paused, on a failing store; the bytes are one worker's."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import Store
from pipeline.teacher.claims import CLAIMS
from tests.conftest import Stage, Tiny, digests
from tests.stage_runner import Result, Running
from tests.unit.storage import conftest as storage_fixtures

s3_endpoint = storage_fixtures.s3_endpoint
bucket = storage_fixtures.bucket

LEASE = ["--capture.lease_s", "1.5"]
FAULTY = ("faulty_store", 0.1, 0.2)


def _content(root: Path) -> dict[str, str]:
    """Return the digest of every file; the folder's own name stands in two texts."""
    found = digests(root)
    for name in ("README.md", "_meta/config.yaml"):
        del found[name]
    return found


def _same_cache(folder: Path, other: Path) -> None:
    assert _content(folder) == _content(other)
    assert not list((folder / CLAIMS).glob("*"))
    assert not list(folder.rglob("*.partial"))


def _until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_three_workers_share_the_shards(
    tiny: Tiny, tiny_cache: Path, start: Callable[..., Running], tmp_path: Path
) -> None:
    flags = [*tiny.stage_one, *LEASE, "--cache_dir", tmp_path / "cache"]
    workers = [start("cache_teacher", flags) for _ in range(3)]
    for worker in workers:
        worker.wait().ok()
    _same_cache(tmp_path / "cache", tiny_cache)


def test_three_workers_share_the_shards_of_a_bucket(
    tiny: Tiny, tiny_cache: Path, start: Callable[..., Running], bucket: str
) -> None:
    url = f"s3://{bucket}/cache"
    env = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    flags = [*tiny.stage_one, "--cache_dir", url, "--capture.lease_s", "5"]
    workers = [start("cache_teacher", flags, env=env) for _ in range(3)]
    os.kill(workers[0].process.pid, signal.SIGKILL)
    workers[0] = start("cache_teacher", flags, env=env)
    for worker in workers:
        worker.wait().ok()
    store = Store(url)
    for name in _content(tiny_cache):
        assert store.read(name) == (tiny_cache / name).read_bytes(), name
    assert store.list(CLAIMS) == []


def test_a_paused_worker_is_overtaken_and_wakes_to_no_harm(
    tiny: Tiny, tiny_cache: Path, start: Callable[..., Running], tmp_path: Path
) -> None:
    flags = [*tiny.stage_one, *LEASE, "--cache_dir", tmp_path / "cache"]
    paused = start("cache_teacher", flags)
    _until(lambda: list((tmp_path / "cache" / CLAIMS).glob("*.json")))
    os.kill(paused.process.pid, signal.SIGSTOP)
    start("cache_teacher", flags).wait().ok()
    os.kill(paused.process.pid, signal.SIGCONT)
    paused.wait().ok()
    _same_cache(tmp_path / "cache", tiny_cache)


def test_a_store_that_fails_one_call_in_ten(
    tiny: Tiny, tiny_cache: Path, start: Callable[..., Running], tmp_path: Path
) -> None:
    flags = [*tiny.stage_one, *LEASE, "--cache_dir", f"faulty://{tmp_path}/cache"]
    workers = [start("cache_teacher", flags, hook=FAULTY) for _ in range(2)]
    for worker in workers:
        worker.wait().ok()
    _same_cache(tmp_path / "cache", tiny_cache)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["whole", "faulty"])
def test_killed_twenty_times_over_and_still_one_workers_bytes(
    store: str,
    tiny: Tiny,
    tiny_cache: Path,
    start: Callable[..., Running],
    stage: Stage,
    tmp_path: Path,
) -> None:
    draw = random.Random(11)
    url = f"{tmp_path}/cache" if store == "whole" else f"faulty://{tmp_path}/cache"
    hook: tuple[Any, ...] = () if store == "whole" else FAULTY
    # Small shards: many claims, and a run that outlasts the kills.
    flags = [*tiny.stage_one, *LEASE, "--cache_dir", url]
    workers = [start("cache_teacher", flags, hook=hook) for _ in range(3)]
    records = tmp_path / "cache/_meta/shards"
    stopped = False
    for kill in range(20):
        time.sleep(draw.uniform(0.05, 1.6))
        victim = draw.randrange(3)
        with contextlib.suppress(ProcessLookupError):
            if kill == 7:  # one is paused past its lease, and woken
                os.kill(workers[victim].process.pid, signal.SIGSTOP)
                stopped = True
                time.sleep(3)
                os.kill(workers[victim].process.pid, signal.SIGCONT)
            os.kill(workers[victim].process.pid, signal.SIGKILL)
        workers[victim].process.join()
        done = sorted(records.glob("*.json")) if records.is_dir() else []
        if len(done) > 2:  # keep the fleet at work: damage is made anew
            draw.choice(done).unlink(missing_ok=True)
        workers[victim] = start("cache_teacher", flags, hook=hook)
    assert stopped
    for worker in workers:
        result = worker.wait(240)
        # A record that was taken away under a finishing worker is the test's doing.
        assert result.code == 0 or "a shard disappeared" in result.err, result.err
    stage("cache_teacher", flags, hook=hook).ok()  # checks every checksum
    _same_cache(tmp_path / "cache", tiny_cache)


def _stopped(worker: Running, within_s: float) -> Result:
    """Send SIGTERM, and see it end with the usual message in time."""
    os.kill(worker.process.pid, signal.SIGTERM)
    begun = time.monotonic()
    result = worker.wait(within_s + 30)
    assert time.monotonic() - begun < within_s
    message = result.refused(143)
    assert message == (
        "stopped by SIGTERM; run the same command again; finished shards are kept."
    ), result.err
    return result


def test_sigterm_while_waiting_for_others(
    tiny: Tiny, start: Callable[..., Running], tmp_path: Path
) -> None:
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache", "--capture.lease_s", "600"]
    first = start("cache_teacher", flags)
    _until(lambda: list((tmp_path / "cache" / CLAIMS).glob("*.json")))
    os.kill(first.process.pid, signal.SIGSTOP)
    second = start("cache_teacher", [*flags, "--observe.log_level", "debug"])
    _until(lambda: "are in other workers' hands" in second.log())
    _stopped(second, 5)
    os.kill(first.process.pid, signal.SIGKILL)


def test_sigterm_while_the_store_is_slow(
    tiny: Tiny, tiny_cache: Path, start: Callable[..., Running], tmp_path: Path
) -> None:
    url = f"faulty://{tmp_path}/cache"
    flags = [*tiny.stage_one, "--cache_dir", url]
    worker = start("cache_teacher", flags, hook=("faulty_store", 0.0, 0.0, 0.5))
    _until(lambda: list((tmp_path / "cache" / CLAIMS).glob("*.json")))
    _stopped(worker, 12)
    start("cache_teacher", flags, hook=("faulty_store", 0.0, 0.0)).wait().ok()
    _same_cache(tmp_path / "cache", tiny_cache)


def test_sigterm_while_the_store_hangs(
    tiny: Tiny, tiny_cache: Path, start: Callable[..., Running], tmp_path: Path
) -> None:
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache"]
    worker = start("cache_teacher", flags, hook=("hanging_store", "data/"))
    _until(lambda: list((tmp_path / "cache" / CLAIMS).glob("*.json")))
    time.sleep(1)
    _stopped(worker, 15)
    given_up = list((tmp_path / "cache" / CLAIMS).glob("*.json"))
    assert given_up
    assert all('"given up"' in claim.read_text() for claim in given_up)
    begun = time.monotonic()
    start("cache_teacher", flags).wait().ok()  # waits for no lease (120 s)
    assert time.monotonic() - begun < 60
    _same_cache(tmp_path / "cache", tiny_cache)


def test_sigterm_in_a_call_that_hears_no_signal(
    tiny: Tiny, start: Callable[..., Running], tmp_path: Path
) -> None:
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache"]
    worker = start(
        "cache_teacher", flags, hook=("hooks", ("endless_engine",), ("short_grace", 2.0))
    )
    _until(lambda: list((tmp_path / "cache" / CLAIMS).glob("*.json")))
    time.sleep(1)
    _stopped(worker, 6)
