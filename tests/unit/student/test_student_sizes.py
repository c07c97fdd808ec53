"""Lengths across tokenizers: counted once, by several processes, stored, opened by all."""

from __future__ import annotations

import logging
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache.io.finalize import finalize
from pipeline.cache.io.reader import Cache, ShardDamaged, open_cache
from pipeline.cache.io.writer import commit_shard
from pipeline.data.retokenise import RetokenisedRows
from pipeline.models.tokenizer import load_tokenizer, tokenizer_files, tokenizer_from_files
from pipeline.storage import Store
from pipeline.storage.local_folder import local_folder
from pipeline.student.build import student_sizes
from pipeline.student.build.aligner import make_aligner
from pipeline.student.build.student_sizes import SizeCounter
from tests.tiny import make_tokenizer, write_corpus
from tests.unit.cache.sample_cache import (
    SHARD,
    SIZES,
    SPEC,
    TEMPERATURES,
    sample_identity,
    sample_shard,
)


@pytest.fixture(autouse=True)
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the files of this test apart from the machine's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "local"))
    return tmp_path / "local/distill/student-sizes"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def cache(corpus: Path, tmp_path: Path) -> Cache:
    """Return a cache of random ids of a real tokenizer."""
    store, identity, records = Store(str(tmp_path / "cache")), sample_identity(), []
    for split, index, number in SIZES:
        record, data = sample_shard(split, index, number, identity=identity)
        commit_shard(store, record, data)
        records.append(record)
    files = tokenizer_files(make_tokenizer(corpus, size=SPEC.vocab_size))
    for name, content in files.items():
        store.write(f"_meta/tokenizer/{name}", content)
    finalize(
        store, Counter(record.split for record in records), identity=identity, spec=SPEC,
        temperatures=TEMPERATURES, corpus_counts={"rows": 10}, tokenizer_files=sorted(files),
        command="made by a test",
    )  # fmt: skip
    return open_cache(str(tmp_path / "cache"))


def make_counter(cache: Cache, corpus: Path, folder: Path, size: int = 330, **more: Any) -> Any:
    make_tokenizer(corpus, size=size).save_pretrained(folder)
    teacher = tokenizer_from_files(cache.tokenizer_files())
    aligner = make_aligner(folder, teacher, load_tokenizer(folder), rows=size)
    return SizeCounter(cache, folder, size, aligner, **more)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.npy"))


@pytest.mark.parametrize("processes", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_the_sizes_are_those_of_the_rows_and_are_stored(
    cache: Cache, corpus: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    processes: int | None,
) -> None:  # fmt: skip
    counter = make_counter(cache, corpus, tmp_path / "student", processes=processes)
    splits = ("train", "heldout") if processes is None else ("train",)
    for split in splits:
        source = cache.source(split)
        rows = RetokenisedRows(source, counter.aligner, counter.sizes(split))
        for shard, count in enumerate(source.shard_rows()):
            read = rows.read_rows(shard, range(count))
            assert rows.shard_sizes(shard).tolist() == [
                [len(row.input_ids_L), row.targets.num_positions] for row in read
            ]
    stored = names(local)
    assert len(stored) == len(splits)
    # The next run, and the other ranks, count nothing: the file is mapped.
    monkeypatch.setattr(student_sizes, "_count_shard", lambda *_: pytest.fail("counted again"))
    again = make_counter(cache, corpus, tmp_path / "student").sizes("train")
    assert isinstance(again, np.memmap)
    assert names(local) == stored


def test_another_tokenizer_or_a_torn_file_is_counted(
    cache: Cache, corpus: Path, local: Path, tmp_path: Path
) -> None:
    first = make_counter(cache, corpus, tmp_path / "student").sizes("train")
    (stored,) = local.glob("*.npy")
    other = make_counter(cache, corpus, tmp_path / "other", size=300).sizes("train")
    assert len(names(local)) == 2
    assert (np.asarray(other)[:, 0] >= np.asarray(first)[:, 0]).all()
    whole = np.array(first)
    stored.write_bytes(stored.read_bytes()[:-8])
    again = make_counter(cache, corpus, tmp_path / "student").sizes("train")
    assert again.tolist() == whole.tolist()


def _rank(url: str, corpus: Path, folder: Path, log: Path, barrier: Any) -> None:
    counter = make_counter(
        open_cache(url), corpus, folder / str(multiprocessing.current_process().pid)
    )
    real = student_sizes._count_shard

    def noted(*arguments: Any) -> Any:
        with log.open("a") as file:
            file.write("counted\n")
        return real(*arguments)

    student_sizes._count_shard = noted
    barrier.wait(60)
    assert counter.sizes("train").shape == (8, 2)


def test_of_ranks_that_start_together_one_counts(
    cache: Cache, corpus: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    barrier, log = context.Barrier(3), tmp_path / "log"
    arguments = (cache.store.url, corpus, tmp_path, log, barrier)
    ranks = [context.Process(target=_rank, args=arguments) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0] * 3
    assert log.read_text().split() == ["counted"] * 2, "each shard of the split once"


def test_without_a_local_folder(
    cache: Cache, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert local_folder("student-sizes") is None
    with caplog.at_level(logging.WARNING):
        sizes = make_counter(cache, corpus, tmp_path / "student").sizes("train")
    assert sizes.shape == (8, 2)
    assert "no local folder can be written to" in caplog.text


def test_a_damaged_shard_is_named(cache: Cache, corpus: Path, tmp_path: Path) -> None:
    """Also where another process finds it, whose errors cannot be sent as they are."""
    (tmp_path / "cache" / SHARD).unlink()
    counter = make_counter(cache, corpus, tmp_path / "student")
    with pytest.raises(ShardDamaged, match=rf"{SHARD}: shard damaged: missing"):
        counter.sizes("train")
    student_sizes._open_worker(cache.store.url, str(tmp_path / "student"), 330, "train")
    assert student_sizes._work(1) is None
    whole = student_sizes._work(0)
    assert whole is not None
    assert whole.shape == (5, 2)
