"""One contract for every store: complete files or none, one creator, clear errors."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from pipeline.errors import StoreError
from pipeline.storage import Store
from pipeline.storage import store as store_module


def test_write_read_replace(store: Store) -> None:
    store.write("a/b/one.bin", b"\x00first")
    assert store.read("a/b/one.bin") == b"\x00first"
    store.write("a/b/one.bin", b"2")
    assert store.read("a/b/one.bin") == b"2"
    store.write("empty", b"")
    assert store.read("empty") == b""
    assert store.size("empty") == 0
    assert store.size("a/b/one.bin") == 1


def test_absent_files(store: Store) -> None:
    for _ in range(2):  # before and after the first file
        with pytest.raises(FileNotFoundError):
            store.read("gone")
        assert store.size("gone") is None
        assert store.list("gone") == []
        assert not store.exists("gone")
        store.delete("gone")
        store.write("here", b"x")


def test_exists_and_delete(store: Store) -> None:
    store.write("a/file", b"x")
    assert store.exists("a/file")
    assert store.exists("a")
    store.delete("a/file")
    assert not store.exists("a/file")
    assert store.size("a/file") is None


def test_list_is_sorted_fresh_and_of_files_only(store: Store) -> None:
    assert store.list("a") == []
    for name in ("a/2", "a/1", "a/deeper/3", "b/4"):
        store.write(name, b"x")
    assert store.list("a") == ["1", "2"]
    assert store.list("a/") == ["1", "2"]
    assert Store(store.url).list("a/deeper") == ["3"]
    Store(store.url).write("a/0", b"x")  # another writer: no stale listing
    assert store.list("a") == ["0", "1", "2"]
    store.delete("a/1")
    assert store.list("a") == ["0", "2"]


def test_sizes_are_those_of_files_directly_below(store: Store) -> None:
    assert store.sizes("folder") == {}
    store.write("folder/b", b"12345")
    store.write("folder/a", b"")
    store.write("folder/below/c", b"1")
    assert store.sizes("folder") == {"a": 0, "b": 5}
    store.write("folder/b", b"1")
    assert store.sizes("folder") == {"a": 0, "b": 1}
    if store.is_local:
        (Path(store.root) / "folder/d.0123.partial").write_bytes(b"half")
        assert store.sizes("folder") == {"a": 0, "b": 1}


def test_folders_are_those_directly_below(store: Store) -> None:
    assert store.folders("folder") == []
    for name in ("folder/b/1", "folder/a/below/2", "folder/c", "folder/b/3"):
        store.write(name, b"x")
    assert store.folders("folder") == ["a", "b"]


def test_many_files_are_deleted(store: Store) -> None:
    names = [f"folder/{number}" for number in range(5)]
    for name in names:
        store.write(name, b"x")
    store.delete_all([])
    store.delete_all([*names[:2], "folder/never-there", names[3]])
    assert store.list("folder") == ["2", "4"]
    store.delete_all(["folder/2", "folder/4"])
    assert store.list("folder") == []


def test_create_only(store: Store) -> None:
    assert store.create("plan", b"mine") is True
    assert store.create("plan", b"other") is False
    assert store.read("plan") == b"mine"
    store.write("plan", b"replaced")
    assert store.create("plan", b"other") is False
    assert store.read("plan") == b"replaced"
    store.delete("plan")
    assert store.create("plan", b"again") is True


@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
def test_of_concurrent_creators_exactly_one_wins(store: Store) -> None:
    number = 8
    for attempt in range(5):
        barrier = Barrier(number)

        def create(me: int, attempt: int = attempt, barrier: Barrier = barrier) -> bool:
            mine = Store(store.url)
            barrier.wait()
            return mine.create(f"plan-{attempt}", bytes([me]) * 1000)

        with ThreadPoolExecutor(number) as pool:
            won = list(pool.map(create, range(number)))
        assert sum(won) == 1
        assert store.read(f"plan-{attempt}") == bytes([won.index(True)]) * 1000


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    contents = [bytes([n]) * 200_000 for n in range(4)]
    store.write("file", contents[0])
    stop = time.monotonic() + 0.5

    def write(n: int) -> None:
        while time.monotonic() < stop:
            store.write("file", contents[n])

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(write, n) for n in (1, 2)]
        while time.monotonic() < stop:
            assert store.read("file") in contents
            assert store.list("") == ["file"]
        for job in jobs:
            job.result()
    assert os.listdir(tmp_path) == ["file"]


def test_paths_and_urls(store: Store) -> None:
    assert store.full_url("a/b") == f"{store.url}/a/b"
    assert store.full_url("") == store.url
    assert store.path("a").endswith("cache/a" if not store.is_local else "root/a")
    assert store.url in repr(store)
    assert (store.free_bytes() is None) != store.is_local
    assert not store.is_local or (store.free_bytes() or 0) > 0


def _seen_while_syncing(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    """Return a list that fills with the files that exist at each fsync."""
    seen: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        seen.extend(str(path.name) for path in root.rglob("*") if path.is_file())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


@pytest.mark.parametrize("method", ["write", "create"])
def test_the_unfinished_file_is_no_parquet_and_does_not_stay(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _seen_while_syncing(monkeypatch, tmp_path)
    getattr(Store(str(tmp_path)), method)("data/0.parquet", b"x")
    # First the synced temporary file, then the folder with the file in place.
    assert len(seen) == 2
    assert seen[0].startswith("0.parquet.")
    assert seen[0].endswith(".partial")
    assert seen[1] == "0.parquet"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["0.parquet"]
    (tmp_path / "data/1.parquet.abc.partial").write_bytes(b"left by a killed writer")
    assert Store(str(tmp_path)).list("data") == ["0.parquet"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("method", ["write", "create"])
def test_a_full_disk_is_said_in_words_and_leaves_nothing(
    number: int, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.write("data/old", b"old")

    def full(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    for name in ("data/new", "data/old"):
        if method == "create" and name == "data/old":
            continue
        with pytest.raises(StoreError, match=rf"the disk is full .cannot {method} {name}.*free"):
            getattr(store, method)(name, b"data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["old"]
    assert store.read("data/old") == b"old"


def test_other_local_faults_are_said_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "root"))

    def refused(*_args: Any, **_kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refused)
        with pytest.raises(StoreError, match=r"cannot write a .Permission denied.*rights"):
            store.write("a", b"x")
    assert list((tmp_path / "root").iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    for root, name in ((tmp_path / "file", "a"), (tmp_path, "file/b"), (tmp_path, "file/b/c")):
        for method in ("write", "create"):
            with pytest.raises(StoreError, match=r"Not a directory|is a file, not a folder"):
                getattr(Store(str(root)), method)(name, b"x")


def test_a_local_write_cut_short_is_not_given_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    real = os.fsync

    def cut(descriptor: int) -> None:
        if os.fstat(descriptor).st_size == 10:
            os.ftruncate(descriptor, 5)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", cut)
    monkeypatch.setattr(store_module.time, "sleep", lambda _: None)
    monkeypatch.setattr(store_module, "_BUDGET_S", 3)
    with pytest.raises(StoreError, match="5 of 10 bytes have arrived"):
        store.write("new", b"0123456789")
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_link_on_nfs_is_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, real = Store(str(tmp_path)), os.link

    def link(source: str, target: str) -> None:
        real(source, target)
        real(source, target)  # the client sends it again: FileExistsError

    monkeypatch.setattr(os, "link", link)
    assert store.create("claim", b"mine") is True
    assert store.create("claim", b"yours") is False


def test_leftovers_of_killed_writers_are_removed_and_the_living_write_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("data/0.parquet", b"whole")
    store._fs.pipe_file(store.path("data/1.parquet.abc.partial"), b"left")
    assert store.remove_partials(["data", "", "gone"]) == 1
    assert store.remove_partials(["data"]) == 0
    assert store.read("data/0.parquet") == b"whole"
    if not store.is_local:
        return
    real, swept = os.fsync, iter([True])

    def fsync(descriptor: int) -> None:
        real(descriptor)
        if next(swept, False):
            assert Store(store.url).remove_partials(["data"]) == 1

    monkeypatch.setattr(os, "fsync", fsync)
    store.write("data/2.parquet", b"again")
    assert store.read("data/2.parquet") == b"again"


def test_unknown_protocols_are_refused() -> None:
    with pytest.raises(StoreError, match=r"nonsense.*expected a local path or a URL"):
        Store("nonsense://x/y")


def test_file_urls_are_local(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/root")
    store.write("a", b"x")
    assert store.is_local
    assert (tmp_path / "root/a").read_bytes() == b"x"
