"""Faults of a remote store: retried while transient, detected when silent, and reported."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StoreError
from pipeline.storage import Store
from pipeline.storage import store as store_module
from pipeline.storage.faults import may_pass


class _Faults:
    """Replaces a method of the file system: fails a number of times, then works."""

    def __init__(self, real: Callable[..., Any], error: Exception, times: int) -> None:
        self.real, self.error, self.times, self.calls = real, error, times, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.real(*args, **kwargs)


_CALLS: list[tuple[str, Callable[[Store], Any]]] = [
    ("cat_file", lambda store: store.read("there")),
    ("pipe_file", lambda store: store.write("new", b"x")),
    ("pipe_file", lambda store: store.create("new", b"x")),
    ("ls", lambda store: store.list("")),
    ("size", lambda store: store.size("there")),
    ("exists", lambda store: store.exists("there")),
    ("rm_file", lambda store: store.delete("there")),
]


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> tuple[Store, list[float]]:
    """Return a remote store with one file, and the pauses it makes."""
    store = Store(f"memory://remote-{time.monotonic_ns()}")
    store.write("there", b"x")
    pauses: list[float] = []
    monkeypatch.setattr(store_module.time, "sleep", pauses.append)
    return store, pauses


@pytest.mark.parametrize(("method", "call"), _CALLS)
def test_a_passing_remote_fault_is_tried_again(
    method: str,
    call: Callable[[Store], Any],
    remote: tuple[Store, list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, pauses = remote
    faults = _Faults(getattr(store._fs, method), ConnectionError("reset by peer"), 3)
    monkeypatch.setattr(store._fs, method, faults)
    call(store)
    assert faults.calls >= 4  # a write checks the size afterwards
    for pause, bound in zip(pauses, (0.5, 1.0, 2.0), strict=True):
        assert bound / 2 <= pause <= bound


@pytest.mark.parametrize(("method", "call"), _CALLS)
def test_a_lasting_remote_fault_ends_in_words_within_a_minute(
    method: str,
    call: Callable[[Store], Any],
    remote: tuple[Store, list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, pauses = remote
    faults = _Faults(getattr(store._fs, method), ConnectionError("reset by peer"), 999)
    monkeypatch.setattr(store._fs, method, faults)
    with pytest.raises(StoreError, match=r"ConnectionError: reset by peer.*check the address"):
        call(store)
    assert 40 < sum(pauses) <= 60
    assert max(pauses) <= 15


def test_a_store_that_asks_for_patience_gets_ten_minutes(
    remote: tuple[Store, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, pauses = remote
    slow = OSError(errno.EBUSY, "An error occurred (SlowDown): Please reduce your request rate.")
    faults = _Faults(store._fs.pipe_file, slow, 999)
    monkeypatch.setattr(store._fs, "pipe_file", faults)
    with pytest.raises(StoreError, match="SlowDown"):
        store.write("new", b"x")
    assert 500 < sum(pauses) <= 600
    pauses.clear()
    with pytest.raises(StoreError):
        store.write("new", b"x", once=True)
    assert pauses == []


def test_workers_that_failed_together_do_not_come_back_together(
    remote: tuple[Store, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, pauses = remote
    drawn = set()
    for _ in range(8):
        monkeypatch.setattr(store._fs, "ls", _Faults(store._fs.ls, ConnectionError("reset"), 1))
        store.list("")
        drawn.add(pauses.pop())
    assert len(drawn) == 8


class _Cut:
    """A put that reports success but stores half of the data, a number of times."""

    def __init__(self, real: Callable[..., Any], times: int) -> None:
        self.real, self.times = real, times

    def __call__(self, path: str, value: bytes, *args: Any, **kwargs: Any) -> Any:
        self.times -= 1
        half = value if self.times < 0 else value[: len(value) // 2]
        return self.real(path, half, *args, **kwargs)


@pytest.mark.parametrize("method", ["write", "create"])
def test_a_write_cut_short_is_noticed_and_made_whole(
    method: str, remote: tuple[Store, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = remote
    monkeypatch.setattr(store._fs, "pipe_file", _Cut(store._fs.pipe_file, 2))
    assert getattr(store, method)("new", b"0123456789") in (None, True)
    assert store.read("new") == b"0123456789"
    monkeypatch.setattr(store._fs, "pipe_file", _Cut(store._fs.pipe_file, 10**6))
    with pytest.raises(StoreError, match="5 of 10 bytes have arrived"):
        getattr(store, method)("newer", b"0123456789")


def test_a_lost_answer_does_not_lose_the_claim(
    remote: tuple[Store, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = remote
    real, lost = store._fs.pipe_file, iter([True, True])

    def pipe_file(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        if next(lost, False):
            raise ConnectionError("the answer was lost")

    monkeypatch.setattr(store._fs, "pipe_file", pipe_file)
    assert store.create("claim", b"mine") is True
    assert store.create("claim", b"yours") is False
    assert store.create("claim", b"mine") is False  # no failure: it was another call's


@pytest.mark.parametrize(("method", "call"), _CALLS)
def test_a_final_answer_is_not_tried_again(
    method: str,
    call: Callable[[Store], Any],
    remote: tuple[Store, list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, pauses = remote
    error = PermissionError(errno.EACCES, "Access Denied")
    faults = _Faults(getattr(store._fs, method), error, 99)
    monkeypatch.setattr(store._fs, method, faults)
    with pytest.raises(StoreError, match="Access Denied"):
        call(store)
    assert faults.calls == 1
    assert pauses == []


def test_a_bucket_that_is_not_there(s3_endpoint: str) -> None:
    store = Store("s3://no-such-bucket-here/cache")
    for method in ("write", "create"):
        with pytest.raises(StoreError, match=f"cannot {method} x .*bucket"):
            getattr(store, method)("x", b"x")
    assert store.list("") == []


def test_a_network_mount_that_comes_back_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, pauses = Store(str(tmp_path)), []
    monkeypatch.setattr(store_module.time, "sleep", pauses.append)
    monkeypatch.setattr(os, "fsync", _Faults(os.fsync, OSError(errno.ESTALE, "Stale"), 2))
    store.write("file", b"x")
    assert store.read("file") == b"x"
    assert len(pauses) == 2


def test_what_may_pass_of_a_store_and_of_a_disk() -> None:
    """A full disk stays full; a disk's other errors are final unless they are known to pass."""
    for local in (False, True):
        assert not may_pass(OSError(errno.ENOSPC, "full"), local=local)
        assert not may_pass(PermissionError(errno.EACCES, "denied"), local=local)
        assert may_pass(OSError(errno.ESTALE, "stale"), local=local)
    assert may_pass(OSError(errno.EINVAL, "what a library makes of it"), local=False)
    assert not may_pass(OSError(errno.EINVAL, "invalid"), local=True)
