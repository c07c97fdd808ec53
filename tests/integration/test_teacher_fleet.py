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

from pipeline.storage import Store
from pipeline.teacher.fleet.leases import LEASES
from tests.conftest import Stage, Tiny, digests
from tests.stage_runner import Result, Running, real_stage
from tests.tiny import write_corpus
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
    assert not list((folder / LEASES).glob("*"))
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


@pytest.mark.slow
def test_one_command_starts_several_workers(tiny: Tiny, tiny_cache: Path, tmp_path: Path) -> None:
    """As `make cache-teacher NPROC=2`: the bytes are those of one worker."""
    flags = [*tiny.stage_one, *LEASE, "--cache_dir", tmp_path / "cache"]
    done = real_stage("workers", ["--nproc", "2", *flags]).ok()
    _same_cache(tmp_path / "cache", tiny_cache)
    assert done.out.count("cache ") == 1
    assert len({line.split(":")[0] for line in done.err.splitlines() if "worker" in line}) <= 2
    # Nothing is left to do, and one worker is told so as well.
    again = real_stage("workers", ["--nproc", "2", *flags]).ok()
    assert "is complete" in again.err


def test_a_worker_whose_device_hangs_ends_and_leaves_its_shard(
    tiny: Tiny,
    tiny_cache: Path,
    stage: Stage,
    start: Callable[..., Running],
    tmp_path: Path,
) -> None:
    pulse = tmp_path / "pulse"
    flags = [*tiny.stage_one, *LEASE, "--cache_dir", tmp_path / "cache"]
    stuck = start(
        "cache_teacher", [*flags, "--teacher.stall_s", "3"], hook=("hanging_engine", 1),
        env={"DISTILL_PULSE_FILE": str(pulse)},
    )  # fmt: skip
    message = stuck.wait().refused(6)
    assert "the teacher has finished no token for 3 s" in message
    assert "--teacher.stall_s" in message
    assert pulse.exists()
    stage("cache_teacher", flags).ok()
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
    assert store.list(LEASES) == []


def test_a_paused_worker_is_overtaken_and_wakes_to_no_harm(
    tiny: Tiny, tiny_cache: Path, start: Callable[..., Running], tmp_path: Path
) -> None:
    flags = [*tiny.stage_one, *LEASE, "--cache_dir", tmp_path / "cache"]
    paused = start("cache_teacher", flags)
    _until(lambda: list((tmp_path / "cache" / LEASES).glob("*.json")))
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


@pytest.fixture(scope="module")
def many_shards(
    tiny: Tiny, stage: Stage, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[object], Path]:
    """Return flags that make about forty shards, and the cache of one undisturbed worker."""
    root = tmp_path_factory.mktemp("many")
    flags = [*tiny.stage_one, "--dataset_name", write_corpus(root / "corpus", samples=300)]
    stage("cache_teacher", [*flags, "--cache_dir", root / "cache"]).ok()
    return flags, root / "cache"


@pytest.mark.slow
@pytest.mark.parametrize("store", ["whole", "faulty"])
def test_killed_twenty_times_over_and_still_one_workers_bytes(
    store: str,
    many_shards: tuple[list[object], Path],
    start: Callable[..., Running],
    stage: Stage,
    tmp_path: Path,
) -> None:
    draw = random.Random(11)
    url = f"{tmp_path}/cache" if store == "whole" else f"faulty://{tmp_path}/cache"
    # Slow enough that there is work to the last kill.
    hook = ("hooks", ("slow_engine", 0.4), *([] if store == "whole" else [FAULTY]))
    flags = [*many_shards[0], *LEASE, "--cache_dir", url]
    workers = [start("cache_teacher", flags, hook=hook) for _ in range(3)]
    held = tmp_path / "cache" / LEASES
    _until(lambda: len(list(held.glob("*.json"))) >= 2)
    # The first is paused past its lease, and its shards are made by others meanwhile.
    os.kill(workers[0].process.pid, signal.SIGSTOP)
    at_work = 0
    for kill in range(20):
        time.sleep(draw.uniform(0.05, 1.6))
        if kill == 7:
            os.kill(workers[0].process.pid, signal.SIGCONT)
        victim = draw.choice((1, 2) if kill < 10 else (0, 1, 2))
        at_work += workers[victim].process.exitcode is None
        with contextlib.suppress(ProcessLookupError):
            os.kill(workers[victim].process.pid, signal.SIGKILL)
        workers[victim].process.join()
        workers[victim] = start("cache_teacher", flags, hook=hook)
    assert at_work >= 15, "most of them died at work"
    for worker in workers:
        worker.wait(240).ok()
    stage("cache_teacher", flags, hook=hook).ok()  # checks every checksum
    _same_cache(tmp_path / "cache", many_shards[1])


@pytest.fixture(scope="module")
def many_units(
    tiny: Tiny, stage: Stage, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[object], Path]:
    """Return flags that cut the corpus into about twenty units, and the cache of one worker."""
    root = tmp_path_factory.mktemp("units")
    corpus = write_corpus(root / "corpus", samples=200)
    flags = [
        *tiny.stage_one, "--dataset_name", corpus, "--corpus.unit_mib", 0.002,
        "--corpus.processes", 1, *LEASE,
    ]  # fmt: skip
    stage("cache_teacher", [*flags, "--cache_dir", root / "cache"]).ok()
    assert len(list((root / "cache/_meta/corpus").rglob("summaries/*.json"))) > 15
    return flags, root / "cache"


def test_three_workers_on_an_empty_folder_each_killed_once(
    many_units: tuple[list[object], Path], start: Callable[..., Running], tmp_path: Path
) -> None:
    """They prepare the corpus and capture it, and no unit is prepared to its end twice."""
    folder = tmp_path / "cache"
    flags = [*many_units[0], "--cache_dir", folder]
    logs = [tmp_path / f"units-{number}" for number in range(6)]

    def begin(number: int) -> Running:
        hook = ("hooks", ("slow_engine", 0.3), ("note_units", str(logs[number])))
        return start("cache_teacher", flags, hook=hook)

    workers = [begin(number) for number in range(3)]
    for number in range(3):
        # The first two while the corpus is prepared, the last one while shards are captured.
        if number < 2:
            _until(lambda n=number: logs[n].exists() and logs[n].read_text().count("begun") > n + 1)
        else:
            _until(lambda: list((folder / "_meta/shards").glob("*.parquet")))
        os.kill(workers[number].process.pid, signal.SIGKILL)
        workers[number].process.join()
        workers[number] = begin(3 + number)
    for worker in workers:
        worker.wait(240).ok()
    _same_cache(folder, many_units[1])
    lines = [line.split() for log in logs if log.exists() for line in log.read_text().splitlines()]
    done = [int(unit) for what, unit, _ in lines if what == "done"]
    begun = [int(unit) for what, unit, _ in lines if what == "begun"]
    killed_while_preparing = 2
    assert len(begun) - len(set(begun)) <= killed_while_preparing
    # Prepared to its end twice is only what was killed just before its summary.
    assert len(done) - len(set(done)) <= killed_while_preparing
    assert set(done) == set(range(len(set(begun))))


@pytest.mark.slow
def test_units_on_a_store_that_fails_one_call_in_ten(
    many_units: tuple[list[object], Path], start: Callable[..., Running], tmp_path: Path
) -> None:
    flags = [*many_units[0], "--cache_dir", f"faulty://{tmp_path}/cache"]
    hook = ("hooks", FAULTY, ("note_units", os.devnull))  # another process has no such store
    workers = [start("cache_teacher", flags, hook=hook) for _ in range(2)]
    for worker in workers:
        worker.wait(300).ok()
    _same_cache(tmp_path / "cache", many_units[1])


@pytest.mark.slow
def test_units_prepared_apart_and_by_processes(
    many_units: tuple[list[object], Path], stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    flags = [*many_units[0], "--cache_dir", folder, "--corpus.processes", 2]
    out = stage("prepare_corpus", flags).ok().out
    assert "200 samples" in out
    assert "200 samples" in stage("prepare_corpus", flags).ok().out
    hook = ("kill_before", "pipeline.teacher.preparation.corpus", "prepare_here")
    stage("cache_teacher", flags, hook=hook).ok()  # prepares nothing
    _same_cache(folder, many_units[1])


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
    _until(lambda: list((tmp_path / "cache" / LEASES).glob("*.json")))
    os.kill(first.process.pid, signal.SIGSTOP)
    second = start("cache_teacher", [*flags, "--observe.log_level", "debug"])
    _until(lambda: "are in other workers' hands" in second.log())
    _stopped(second, 5)
    os.kill(first.process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_sigterm_while_the_store_is_slow(
    tiny: Tiny, tiny_cache: Path, start: Callable[..., Running], tmp_path: Path
) -> None:
    url = f"faulty://{tmp_path}/cache"
    flags = [*tiny.stage_one, "--cache_dir", url]
    worker = start("cache_teacher", flags, hook=("faulty_store", 0.0, 0.0, 0.5))
    _until(lambda: list((tmp_path / "cache" / LEASES).glob("*.json")))
    _stopped(worker, 12)
    start("cache_teacher", flags, hook=("faulty_store", 0.0, 0.0)).wait().ok()
    _same_cache(tmp_path / "cache", tiny_cache)


def test_sigterm_while_the_store_hangs(
    tiny: Tiny, tiny_cache: Path, start: Callable[..., Running], tmp_path: Path
) -> None:
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache"]
    worker = start("cache_teacher", flags, hook=("hanging_store", "data/"))
    _until(lambda: list((tmp_path / "cache" / LEASES).glob("*.json")))
    time.sleep(1)
    _stopped(worker, 15)
    given_up = list((tmp_path / "cache" / LEASES).glob("*.json"))
    assert given_up
    assert all('"given up"' in lease.read_text() for lease in given_up)
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
    _until(lambda: list((tmp_path / "cache" / LEASES).glob("*.json")))
    time.sleep(1)
    _stopped(worker, 6)
