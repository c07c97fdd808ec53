"""The capture from beginning to end over a store whose requests are counted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from pipeline.cache.io.finalize import ShardsMissing
from pipeline.cache.io.writer import commit_shard, encode_shard
from pipeline.cache.layout.fold import reopen
from pipeline.cache.layout.manifest import Manifest
from pipeline.cache.layout.names import record_name, shard_name
from pipeline.cache.layout.quarantine import QuarantinedRow, quarantine_name, quarantine_rows
from pipeline.cache.layout.records import encode_record
from pipeline.cache.tools.checking.rebuild import record_of
from pipeline.config import fingerprint
from pipeline.corpus.prepared.summary import SampleTotals
from pipeline.storage import Store
from pipeline.teacher.capture import run as run_module
from pipeline.teacher.capture.complete import complete_cache
from pipeline.teacher.capture.plan import PlannedShard
from pipeline.teacher.capture.run import fill_cache
from pipeline.teacher.capture.task import CaptureTask
from pipeline.teacher.settings import CaptureSettings
from tests.unit.cache.records import Counted
from tests.unit.cache.sample_cache import SIZES, SPEC, TEMPERATURES, sample_identity, sample_rows


class Samples:
    """The samples of a planned shard."""

    def __init__(self, split: str, index: int, number: int) -> None:
        rows, self.tails = sample_rows(number, seed=100 * (split == "heldout") + index)
        self.rows = rows
        self.num_tokens = sum(row.input_ids_L.size for row in rows)

    source_xxh3_128 = "units"

    def samples(self) -> Any:
        return self


class Source:
    """All shards, from the beginning."""

    is_complete, content = True, "text"

    def __init__(self, shards: list[PlannedShard]) -> None:
        self.shards = shards

    def counts(self) -> SimpleNamespace:
        return SimpleNamespace()

    def projected(self) -> SampleTotals:
        return SampleTotals(10, 100, 50)


class Worker:
    """Stands for the worker: it commits what has no record, and counts that."""

    made: list[str] = []  # noqa: RUF012
    spoiled: set[str] = set()  # noqa: RUF012

    def __init__(self, task: CaptureTask, board: Any, *_: Any, **__: Any) -> None:
        self._task, self._store = task, board.store

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def run(self) -> None:
        for shard in self._task.source.shards:
            if shard.is_done(self._store):
                continue
            samples: Any = shard.samples
            record, data = encode_shard(
                samples.rows, SPEC, split=shard.split, index=shard.index,
                temperatures=TEMPERATURES, identity_digest=fingerprint(self._task.identity),
                tails=samples.tails, source_xxh3_128="units",
            )  # fmt: skip
            commit_shard(self._store, record, data)
            if shard.name in self.spoiled:
                self._store.write(record.path, data[:-1])
                self.spoiled.discard(shard.name)
            self.made.append(shard.name)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> tuple[Store, Counted]:
    Worker.made, Worker.spoiled = [], set()
    monkeypatch.setattr(run_module, "CaptureWorker", Worker)
    monkeypatch.setattr(run_module, "tokenizer_files", lambda _: {"tokenizer.json": b"{}"})
    store = Store(f"memory://fill-{uuid4().hex}/cache")
    counted = Counted(store._fs)
    store._fs = counted
    return store, counted


def _fill(store: Store) -> Manifest:
    shards: Any = [PlannedShard(s, i, Samples(s, i, n)) for s, i, n in SIZES]  # type: ignore[arg-type]
    task: Any = CaptureTask(
        SimpleNamespace(tokenizer=None),  # type: ignore[arg-type]
        CaptureSettings(),
        Source(shards),  # type: ignore[arg-type]
        SimpleNamespace(temperatures=TEMPERATURES),  # type: ignore[arg-type]
        SPEC,
        sample_identity(),
    )
    complete = complete_cache(store, task.identity, checksums=False)
    if complete is not None:
        return complete
    return fill_cache(
        task, store=store, command="a test", resolved_config="{}", progress_every_s=60.0
    )


@pytest.fixture(autouse=True)
def _no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "asdict", lambda _: {"rows": 10})


def test_a_restart_over_a_complete_cache_reads_its_manifest(store: tuple[Store, Counted]) -> None:
    store, counted = store  # type: ignore[assignment]
    first = _fill(store)
    assert len(Worker.made) == 3
    counted.requests.clear()
    read: list[str] = []
    real = store.read
    store.read = lambda name: (read.append(name), real(name))[1]  # type: ignore[method-assign,func-returns-value]
    assert _fill(store) == first
    assert len(counted.requests) <= 10, counted.requests
    assert not [name for name in read if name.startswith("data/")]
    assert len(Worker.made) == 3


def test_a_lease_of_one_that_was_killed_after_the_manifest_is_removed(
    store: tuple[Store, Counted],
) -> None:
    store, _ = store  # type: ignore[assignment]
    lease = "_meta/leases/manifest.0.json"
    first = _fill(store)
    store.write(lease, b"{}")
    assert _fill(store) == first
    assert not store.exists(lease), "by the next command"
    manifest = store.read("_meta/manifest.json")
    store.delete("_meta/manifest.json")

    def written_by_another(_: Worker) -> None:
        store.write("_meta/manifest.json", manifest)
        store.write(lease, b"{}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "run", written_by_another)
        assert _fill(store) == first
    assert not store.exists(lease), "by a worker that waited"


def test_what_has_no_record_is_captured_and_nothing_else(store: tuple[Store, Counted]) -> None:
    store, _ = store  # type: ignore[assignment]
    first = _fill(store)
    reopen(store, [("train", 1)])
    Worker.made.clear()
    assert _fill(store) == first
    assert Worker.made == ["train-00001"]
    # A shard without its file, and one whose write was cut short, found when sizes are compared.
    store.delete("_meta/manifest.json")
    store.delete("data/heldout/00000.parquet")
    store.write("data/train/00000.parquet", b"cut")
    Worker.made.clear()
    assert _fill(store) == first
    assert sorted(Worker.made) == ["heldout-00000", "train-00000"]


def test_what_is_cut_short_every_time_ends_with_its_name(
    store: tuple[Store, Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = store  # type: ignore[assignment]
    Worker.spoiled.add("train-00001")
    _fill(store)
    assert Worker.made.count("train-00001") == 2
    store.delete("_meta/manifest.json")
    reopen(store, [("train", 1)])

    class Always(set[str]):
        def discard(self, _: object) -> None:
            return

    monkeypatch.setattr(Worker, "spoiled", Always({"train-00001"}))
    with pytest.raises(ShardsMissing, match=r"1 of 3 shards .*: train-00001"):
        _fill(store)


def test_a_list_of_quarantined_rows_that_no_record_knows_of(store: tuple[Store, Counted]) -> None:
    """The record says how many rows its shard goes without; the list has to agree."""
    store, _ = store  # type: ignore[assignment]
    first = _fill(store)
    quarantine_rows(store, "train-00001", [QuarantinedRow("0" * 32, "an error", 3)])
    Worker.made.clear()
    with pytest.raises(ShardsMissing, match="train-00001"):
        _fill(store)
    assert Worker.made == ["train-00001"] * 2
    store.delete(quarantine_name("train-00001"))
    assert _fill(store) == first


def test_a_shard_of_other_text_is_captured_again(
    store: tuple[Store, Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = store  # type: ignore[assignment]
    first = _fill(store)
    store.delete("_meta/manifest.json")
    monkeypatch.setattr(Samples, "source_xxh3_128", "other units")
    Worker.made.clear()
    with pytest.raises(ShardsMissing, match="3 of 3 shards"):
        _fill(store)  # the stub goes on to say that they are made from the old one
    # As often as a run tries; then the old text is there again.
    assert Worker.made == ["train-00000", "train-00001", "heldout-00000"] * 2
    monkeypatch.setattr(Samples, "source_xxh3_128", "units")
    assert _fill(store) == first


def test_a_record_that_says_no_text_is_not_of_the_plan(store: tuple[Store, Counted]) -> None:
    """One that is written again from its shard has the checksum of the text from there."""
    store, _ = store  # type: ignore[assignment]
    first = _fill(store)
    reopen(store, [("train", 1)])
    record = record_of(store.read(shard_name("train", 1)), "train", 1, None)
    assert record is not None
    store.write(record_name("train", 1), encode_record(replace(record, source_xxh3_128="")))
    Worker.made.clear()
    assert _fill(store) == first
    assert Worker.made == ["train-00001"]
