"""Where a node keeps copies of a remote cache's shards, and when it keeps none."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.cache.io.reader import Cache, open_cache
from pipeline.data.settings import DataSettings
from pipeline.student.training import shard_copies
from pipeline.student.training.distributed import Distributed
from pipeline.student.training.shard_copies import open_local_copies
from tests.unit.cache.sample_cache import write_cache

FOUR = Distributed(rank=0, local_rank=0, world_size=4)


@pytest.fixture
def remote() -> Any:
    """Return a complete cache in a store that is no local disk."""
    write_cache("memory://shard-copies/cache")
    yield open_cache("memory://shard-copies/cache")
    fsspec.filesystem("memory").rm("/shard-copies", recursive=True)


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a node of four processes with a disk of its own, outside of Kubernetes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    mounts = tmp_path / "mounts"
    mounts.write_text("disk / ext4 rw 0 0\n")
    monkeypatch.setattr(shard_copies, "_MOUNTS", mounts)
    return tmp_path / "distill/shards"


def read_all(cache: Cache) -> None:
    source = cache.source("train")
    for shard in range(len(source.shards)):
        source.open(shard)


def test_several_processes_share_copies_of_a_remote_cache(remote: Cache, node: Path) -> None:
    remote.copies = open_local_copies(remote, DataSettings(), FOUR)
    assert remote.copies is not None
    read_all(remote)
    assert len(list(node.glob("*.shard"))) == 2
    assert node.stat().st_mode & 0o077 == 0, "nobody else may write there"
    # The next epoch, or another rank, needs the store no more.
    remote.store.delete("data/train/00000.parquet")
    read_all(remote)


@pytest.mark.parametrize("case", ["off", "one process", "local", "pod", "memory", "no folder"])
def test_none_where_they_are_of_no_use_or_do_harm(
    case: str, remote: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    cache, data = remote, DataSettings(disk_cache="off" if case == "off" else "auto")
    said = ""
    if case == "one process":
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    elif case == "local":
        write_cache(str(tmp_path / "cache"))
        cache = open_cache(str(tmp_path / "cache"))
    elif case == "pod":
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        said = "a pod is evicted at a limit of local disk"
    elif case == "memory":
        shard_copies._MOUNTS.write_text(f"disk / ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw 0 0\n")
        said = "is in memory"
    elif case == "no folder":
        (tmp_path / "distill").write_text("")
        said = "no folder for them can be written to"
    assert open_local_copies(cache, data, FOUR) is None
    assert said in caplog.text if said else caplog.text == ""


def test_a_folder_by_name_is_used_whatever_the_node(remote: Cache, tmp_path: Path) -> None:
    alone = Distributed(rank=0, local_rank=0, world_size=1)
    copies = open_local_copies(remote, DataSettings(disk_cache=str(tmp_path / "mine")), alone)
    assert copies is not None
    assert (tmp_path / "mine").is_dir()


def test_auto_leaves_half_of_the_disk(
    remote: Cache, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is free together with the copies of earlier runs, so that it stays the same."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    first = open_local_copies(remote, DataSettings(), FOUR)
    (node / f"{'0' * 32}.shard").write_bytes(b"x" * 4_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=6_000))
    second = open_local_copies(remote, DataSettings(), FOUR)
    for copies in (first, second):
        assert copies is not None
        assert copies._limit_bytes == 5_000


def test_a_copy_that_another_run_removes_meanwhile_is_not_counted(
    remote: Cache, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listed and then gone, as this link is."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=6_000))
    node.mkdir(parents=True)
    (node / f"{'0' * 32}.shard").write_bytes(b"x" * 4_000)
    (node / f"{'1' * 32}.shard").symlink_to(node / "removed")
    copies = open_local_copies(remote, DataSettings(), FOUR)
    assert copies is not None
    assert copies._limit_bytes == 5_000
