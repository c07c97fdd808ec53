"""Copies of shards on a local disk: whole or not there, bounded, shared, and never in the way."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from pipeline.cache.io.local_copies import LocalCopies, _lock
from pipeline.cache.layout.embedded_checksum import checksum

SHARDS = [bytes([number]) * 1000 for number in range(5)]
NAMES = [checksum(shard) for shard in SHARDS]


class Fetch:
    """Reads shards from where they come from, and counts."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, number: int) -> Callable[[], bytes]:
        def fetch() -> bytes:
            self.calls.append(number)
            return SHARDS[number]

        return fetch


def read(copies: LocalCopies, number: int, fetch: Fetch) -> None:
    assert copies.read(NAMES[number], fetch(number)) == SHARDS[number]


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_each_shard_is_fetched_once(tmp_path: Path) -> None:
    """Also by a second run, and by another cache with the same bytes."""
    fetch = Fetch()
    for _ in range(2):
        copies = LocalCopies(tmp_path / "copies", 10_000)
        for number in (0, 1, 0, 1):
            read(copies, number, fetch)
    assert fetch.calls == [0, 1]
    assert names(tmp_path / "copies") == {f"{name}.shard" for name in NAMES[:2]}


def test_a_damaged_copy_is_fetched_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fetch, copies = Fetch(), LocalCopies(tmp_path, 10_000)
    read(copies, 0, fetch)
    file = tmp_path / f"{NAMES[0]}.shard"
    for damage in (SHARDS[0][:-1], b"", SHARDS[1]):
        file.write_bytes(damage)
        read(copies, 0, fetch)
        assert file.read_bytes() == SHARDS[0]
    assert fetch.calls == [0] * 4
    assert caplog.text.count("this copy of a shard is damaged") == 3


def test_damaged_bytes_of_the_cache_are_not_kept(tmp_path: Path) -> None:
    """They are returned, and the reader of the cache says what it thinks of them."""
    copies = LocalCopies(tmp_path, 10_000)
    assert copies.read(NAMES[0], lambda: b"damaged") == b"damaged"
    assert names(tmp_path) == set()


def test_errors_of_the_cache_pass_through(tmp_path: Path) -> None:
    def missing() -> bytes:
        raise FileNotFoundError("gone")

    copies = LocalCopies(tmp_path, 10_000)
    with pytest.raises(FileNotFoundError, match="gone"):
        copies.read(NAMES[0], missing)
    assert names(tmp_path) == set()
    fetch = Fetch()
    read(copies, 0, fetch)
    read(copies, 0, fetch)
    assert fetch.calls == [0]


def test_the_ones_unused_for_longest_go(tmp_path: Path) -> None:
    """And nothing that is not a copy."""
    (tmp_path / "notes.txt").write_bytes(b"x" * 5000)
    (tmp_path / f"{NAMES[4]}.parquet").write_bytes(b"x" * 5000)
    fetch, copies = Fetch(), LocalCopies(tmp_path, 3_500)
    for number in (0, 1, 2):
        read(copies, number, fetch)
        os.utime(tmp_path / f"{NAMES[number]}.shard", (number, number))
    read(copies, 0, fetch)  # used again: younger than 1 and 2 now
    read(copies, 3, fetch)
    kept = {f"{NAMES[number]}.shard" for number in (0, 2, 3)}
    assert names(tmp_path) == kept | {"notes.txt", f"{NAMES[4]}.parquet"}
    read(copies, 1, fetch)
    assert fetch.calls == [0, 1, 2, 3, 1]


def test_a_shard_above_the_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fetch, copies = Fetch(), LocalCopies(tmp_path, 999)
    for number in (0, 0, 1):
        read(copies, number, fetch)
    assert names(tmp_path) == set()
    assert caplog.text.count("no more copies of shards are kept here") == 1
    assert "a shard of 1000 bytes is larger than the limit" in caplog.text


def test_a_full_disk_is_said_once_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel itself refuses: the file to be written is /dev/full."""
    fetch, copies = Fetch(), LocalCopies(tmp_path, 10_000)
    read(copies, 0, fetch)
    (tmp_path / f"{NAMES[1]}.partial").symlink_to("/dev/full")
    caplog.set_level(logging.WARNING)
    for number in (1, 2, 1, 0):
        read(copies, number, fetch)
    assert fetch.calls == [0, 1, 2, 1], "what it held is used still"
    assert caplog.text.count("the disk is full") == 1
    assert names(tmp_path) == {f"{NAMES[0]}.shard"}


def test_a_folder_that_is_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "copies").write_text("")
    fetch, copies = Fetch(), LocalCopies(tmp_path / "copies", 10_000)
    read(copies, 0, fetch)
    read(copies, 0, fetch)
    assert fetch.calls == [0, 0]
    assert caplog.text.count("no more copies of shards are kept here") == 1


KILLED = """
import os, signal, sys
from pipeline.cache.io.local_copies import LocalCopies
from pipeline.cache.layout.embedded_checksum import checksum

data = bytes(range(256)) * 4096
write = os.write

def half(descriptor, rest):
    write(descriptor, bytes(rest)[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

os.write = half
LocalCopies(sys.argv[1], 1 << 30).read(checksum(data), lambda: data)
"""


@pytest.mark.parametrize("sweep", [False, True])
def test_killed_in_the_middle_of_a_copy(tmp_path: Path, sweep: bool) -> None:
    """The next process takes the file over, or removes it where it does not want that shard."""
    data = bytes(range(256)) * 4096
    living = LocalCopies(tmp_path, 1 << 30)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left.suffix, left.stat().st_size) == (".partial", len(data) // 2)
    if sweep:
        LocalCopies(tmp_path, 1 << 30)
        assert names(tmp_path) == set()
    assert living.read(checksum(data), lambda: data) == data
    assert living.read(checksum(data), lambda: pytest.fail("it was not kept")) == data
    assert names(tmp_path) == {f"{checksum(data)}.shard"}


def _rank(folder: str, log: str, barrier: Any) -> None:
    def fetch(number: int) -> bytes:
        with open(log, "a") as file:
            file.write(f"{number}\n")
        time.sleep(0.05)
        return SHARDS[number]

    copies = LocalCopies(folder, 10_000)
    barrier.wait(30)
    for number in range(len(SHARDS)):
        assert copies.read(NAMES[number], lambda number=number: fetch(number)) == SHARDS[number]


def test_ranks_that_start_together_fetch_each_shard_once(tmp_path: Path) -> None:
    """Four processes want the same shards at the same moment."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    folder, log = str(tmp_path / "copies"), str(tmp_path / "log")
    ranks = [context.Process(target=_rank, args=(folder, log, barrier)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert sorted(Path(log).read_text().split()) == [str(n) for n in range(len(SHARDS))]
    assert names(Path(folder)) == {f"{name}.shard" for name in NAMES}


def test_who_waits_for_a_file_that_is_renamed_opens_the_next_one(tmp_path: Path) -> None:
    """What it waited for is the finished copy by then: to write into it would spoil that."""
    path = tmp_path / f"{'0' * 32}.partial"
    first = _lock(path)
    found: list[BinaryIO] = []
    waiting = threading.Thread(target=lambda: found.append(_lock(path)))
    waiting.start()
    time.sleep(0.2)
    first.write(b"whole")
    path.rename(tmp_path / "copy")
    first.close()
    waiting.join(10)
    found[0].write(b"more")
    found[0].close()
    assert (tmp_path / "copy").read_bytes() == b"whole"
