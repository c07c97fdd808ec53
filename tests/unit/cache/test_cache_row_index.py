"""Row lengths of a large cache are one file of the node; large segments are read in part."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pwd
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache.io import row_index
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.row_index import open_row_index
from pipeline.cache.io.segments import RecordReader, iter_records, segment_columns
from pipeline.cache.layout.manifest import Manifest, read_manifest
from pipeline.cache.layout.records import LENGTHS, LIGHT
from pipeline.errors import CacheError
from pipeline.storage import Store
from tests.unit.cache.planned_cache import SEGMENT, flip
from tests.unit.cache.records import commit_made_up, counted, finalize_made_up, made_up_record
from tests.unit.cache.sample_cache import SIZES, sample_shard


@pytest.fixture
def as_if_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_index, "_SMALL_ROWS", 0)


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where this node keeps the files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node"))
    return tmp_path / "node/distill/row-lengths"


def _check(url: str) -> None:
    index = open_row_index(Store(url), read_manifest(Store(url)))
    for split, shard, rows in SIZES:
        record, _ = sample_shard(split, shard, rows)
        sizes = index.sizes(split, shard)
        assert sizes.dtype == np.int32
        assert sizes.tolist() == [
            list(pair) for pair in zip(record.row_tokens, record.row_loss_tokens, strict=True)
        ]
        line = index.lines(split)[shard]
        assert line.path == record.path
        for name in LIGHT:
            assert getattr(line, name) == getattr(record, name), name


@pytest.mark.usefixtures("as_if_large")
def test_one_file_for_all_processes_of_a_node(made: Path, node: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_check, args=(str(made),)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    (file,) = node.glob("*.rows")
    assert not list(node.glob("*unfinished"))
    before = file.stat().st_ino
    # Whoever comes later reads no segment.
    store, requests = counted(str(made))
    manifest = read_manifest(store)
    requests.requests.clear()
    open_row_index(store, manifest)
    assert requests.requests == []
    assert file.stat().st_ino == before


@pytest.mark.usefixtures("as_if_large")
def test_the_lengths_are_mapped_and_not_held(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(Store(str(made)))
    index = open_row_index(Store(str(made)), manifest)
    base: object = index.sizes("train", 1)
    while getattr(base, "base", None) is not None and not isinstance(base, np.memmap):
        base = base.base  # type: ignore[attr-defined]
    assert isinstance(base, np.memmap)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(row_index, "_SMALL_ROWS", 1000)
    small = open_cache(str(made)).source("train")
    assert np.array_equal(small.shard_sizes(1), index.sizes("train", 1))
    assert np.array_equal(small.lengths(), index.all_sizes("train")[:, 0])
    assert np.array_equal(small.loss_token_counts(), index.all_sizes("train")[:, 1])


@pytest.mark.usefixtures("as_if_large")
@pytest.mark.parametrize("kind", ["flipped", "cut", "longer", "killed"])
def test_a_damaged_file_is_written_again(kind: str, made: Path, node: Path) -> None:
    _check(str(made))
    (file,) = node.glob("*.rows")
    whole = file.read_bytes()
    # Each byte of the head, and every third one of the sizes.
    flipped = sorted({*range(64), *range(0, len(whole), 3)})
    for at in flipped if kind == "flipped" else [0]:
        if kind == "flipped":
            flip(file, at, at % 8)
        elif kind == "killed":
            file.rename(file.with_suffix(".rows-unfinished"))
        else:
            file.write_bytes(whole[:-1] if kind == "cut" else whole + b"x")
        _check(str(made))
        assert file.read_bytes() == whole


@pytest.mark.usefixtures("as_if_large")
def test_a_file_has_its_name_when_it_is_whole(
    made: Path, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_handle: int) -> None:
        assert not list(node.glob("*.rows"))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        _check(str(made))
    assert not list(node.glob("*.rows"))
    _check(str(made))
    assert len(list(node.glob("*.rows"))) == 1


@pytest.mark.usefixtures("as_if_large")
def test_without_a_disk_each_process_holds_its_own(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "node").write_text("a file, no folder")
    _check(str(made))
    assert "no local folder can be written to" in caplog.text
    (tmp_path / "node").unlink()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(row_index, "_write", full)
    _check(str(made))
    assert "the row lengths cannot be kept there (no space left)" in caplog.text


@pytest.mark.usefixtures("as_if_large")
def test_a_user_without_a_name_has_a_folder_too(
    made: Path, node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers run under numbers that no passwd file names. Nobody else may write there."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    _check(str(made))
    assert len(list(node.glob("*.rows"))) == 1
    assert node.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("as_if_large")
def test_files_that_nobody_opens_go_when_another_is_written(
    made: Path, cache_dir: Path, node: Path
) -> None:
    _check(str(made))
    (file,) = node.glob("*.rows")
    for name in ("old.rows", "killed.rows-unfinished", "new.rows"):
        (node / name).write_bytes(b"lengths")
    for old in (file, node / "old.rows", node / "killed.rows-unfinished"):
        os.utime(old, (0, 0))
    _check(str(made))  # opened, so no longer old; nothing was written
    assert time.time() - file.stat().st_mtime < 60
    assert (node / "old.rows").exists()
    commit_made_up(Store(str(cache_dir)), "train", 2)
    finalize_made_up(Store(str(cache_dir)), {"train": 3, "heldout": 1})
    open_row_index(Store(str(cache_dir)), read_manifest(Store(str(cache_dir))))
    left = {path.name for path in node.glob("*.rows*")}
    assert {file.name, "new.rows"} < left
    assert len(left) == 3


def test_a_small_cache_keeps_no_file(made: Path, node: Path) -> None:
    _check(str(made))
    assert not node.exists()


@pytest.fixture
def many() -> Iterator[tuple[Store, Manifest]]:
    store = Store("memory://row-index-many/cache")
    for index in range(40):
        commit_made_up(store, "train", index, rows=2000)
    yield store, finalize_made_up(store, {"train": 40})
    store._fs.rm(store.root, recursive=True)


def test_only_the_columns_that_are_needed_are_read(many: tuple[Store, Manifest]) -> None:
    store, manifest = many
    (segment,) = manifest.segments
    read: list[int] = []
    real = store.open

    class Watched:
        def __init__(self, file: object) -> None:
            self._file = file

        def read(self, size: int = -1) -> bytes:
            data: bytes = self._file.read(size)  # type: ignore[attr-defined]
            read.append(len(data))
            return data

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

        def __enter__(self) -> object:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()  # type: ignore[attr-defined]

    store.open = lambda name: Watched(real(name))  # type: ignore[method-assign,assignment,return-value]
    whole = segment_columns(store, segment, LENGTHS)
    assert read == []
    part = segment_columns(store, segment, LENGTHS, whole_bytes=0)
    assert part.equals(whole)

    assert sum(read) < 0.1 * segment.segment_bytes  # Arrow reads 64 KB at the end in any case
    assert len(read) < 20


def test_a_damaged_column_is_found_where_only_columns_are_read(made: Path, cache_dir: Path) -> None:
    manifest = read_manifest(Store(str(made)))
    file, segment = cache_dir / SEGMENT, manifest.segments[0]
    whole = file.read_bytes()
    wanted = segment_columns(Store(str(made)), segment, LENGTHS)
    for at in range(0, len(whole), 3):
        file.write_bytes(whole)
        flip(file, at, at % 8)
        with pytest.raises(CacheError, match="checksum does not match"):
            segment_columns(Store(str(cache_dir)), segment, LENGTHS)
        # A bit of the ids, or of metadata that nobody reads, changes nothing.
        with contextlib.suppress(CacheError):
            found = segment_columns(Store(str(cache_dir)), segment, LENGTHS, whole_bytes=0)
            for name in ("rows", "tokens", "xxh3_128", *LENGTHS):
                assert found.column(name).equals(wanted.column(name)), (at, name)


def test_records_at_any_place(many: tuple[Store, Manifest]) -> None:
    store, manifest = many
    reader = RecordReader(store, manifest)
    for index in (39, 0, 7):
        assert reader.read("train", index) == made_up_record("train", index, rows=2000)
    every = list(iter_records(store, manifest))
    assert [record.index for record in every] == list(range(40))
    light = next(iter_records(store, manifest, "train", LIGHT))
    assert (light.row_ids, list(light.row_tokens)) == (b"", [])


def test_a_segment_is_read_by_one_request_and_a_manifest_too(many: tuple[Store, Manifest]) -> None:
    store, requests = counted(many[0].url)
    manifest = read_manifest(store)
    assert requests.requests == ["cat_file"]
    open_row_index(store, manifest)
    assert requests.requests == ["cat_file", "cat_file"]
