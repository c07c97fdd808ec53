"""The worker's loop: writes overlap the teacher, one shard waits, room is asked for beforehand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.io.writer import commit_shard
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.names import shard_name
from pipeline.cache.layout.quarantine import QuarantinedRow, quarantine_rows, read_quarantined_rows
from pipeline.cache.layout.records import ShardRecord, encode_record
from pipeline.errors import ModelError, StoreError
from pipeline.observe.shares import Shares
from pipeline.progress import Progress
from pipeline.storage import Store
from pipeline.teacher.capture import task as task_module
from pipeline.teacher.capture import worker as worker_module
from pipeline.teacher.capture.agreement import QuarantineLists
from pipeline.teacher.capture.plan import PlannedShard
from pipeline.teacher.capture.task import CaptureTask
from pipeline.teacher.capture.worker import CaptureWorker
from pipeline.teacher.fleet.leases import LEASES, LeaseBoard
from pipeline.teacher.fleet.quarantine import Answered, EngineLost
from pipeline.teacher.settings import CaptureSettings
from tests.unit.cache.records import read_record
from tests.unit.teacher.captured import ROWS, SCHEME, TOKENS, Engine, Source, row_id, shards_of


def _encode(_task: Any, shard: PlannedShard, columns: Any, quarantined: Any) -> Any:
    """Stand for the codec, which is compiled at its first use."""
    data = f"{shard.name} without {sorted(quarantined)}".encode()
    record = ShardRecord(
        split="train", index=shard.index, path=shard_name("train", shard.index),
        rows=len(columns), tokens=ROWS * TOKENS, loss_tokens=1, entries=1, bytes=len(data),
        xxh3_128=checksum(data), kept_mass=1.0, entropy=0.0,
    )  # fmt: skip
    return record, data


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "cache"))


@pytest.fixture
def new_worker(monkeypatch: pytest.MonkeyPatch) -> Callable[..., CaptureWorker]:
    """Return a maker of workers over an engine, and let commits take `write_s`."""

    def new(
        board: LeaseBoard, engine: Engine, shards: tuple[PlannedShard, ...], **options: Any
    ) -> CaptureWorker:
        settings = CaptureSettings(tries=2, max_quarantined_fraction=options.pop("most", 0.0))
        pause = options.pop("write_s", 0.0)

        def slow_commit(*args: Any) -> None:
            time.sleep(pause)
            commit_shard(*args)

        monkeypatch.setattr(task_module, "open_engine", lambda *_, **__: engine)
        monkeypatch.setattr(worker_module, "encode_columns", _encode)
        monkeypatch.setattr(worker_module, "describe_environment", lambda *_: {"device": "none"})
        monkeypatch.setattr(worker_module, "commit_shard", slow_commit)
        model = SimpleNamespace(path=None)
        teacher: Any = SimpleNamespace(settings=None, model=model, max_length=0)
        source: Any = Source(shards)
        task = CaptureTask(teacher, settings, source, SCHEME, CodecSpec(32), {"a": 1})
        progress = Progress(None, enabled=False)
        worker = CaptureWorker(task, board, progress, Shares())
        worker._bytes_per_token = options.pop("bytes_per_token", 0.0)
        assert not options
        return worker

    return new


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Return when each shard was encoded and committed."""
    found: list[tuple[float, float]] = []
    real = CaptureWorker._write

    def write(self: Any, *args: Any) -> None:
        begun = time.monotonic()
        real(self, *args)
        found.append((begun, time.monotonic()))

    monkeypatch.setattr(CaptureWorker, "_write", write)
    return found


def _overlap(span: tuple[float, float], others: list[tuple[float, float]]) -> float:
    return sum(max(0.0, min(span[1], b) - max(span[0], a)) for a, b in others)


def test_writes_overlap_the_teacher_and_one_shard_waits(
    store: Store, new_worker: Callable[..., CaptureWorker], writes: list[tuple[float, float]]
) -> None:
    board, engine, shards = LeaseBoard(store, "w", 60), Engine(0.3), shards_of(5)
    encode_record(_encode(None, shards[0], [], [])[0])  # Arrow's first array takes half a second
    with new_worker(board, engine, shards, write_s=0.3) as worker:
        worker.run()
    # Each write but the last runs while the teacher has the next shard.
    overlapped = [_overlap(span, engine.spans) / (span[1] - span[0]) for span in writes[:-1]]
    assert min(overlapped) > 0.5
    # A slow store holds the teacher back: never more than two shards between call and commit.
    engine, store_2 = Engine(0.0), Store(f"{store.root}-slow")
    writes.clear()
    with new_worker(LeaseBoard(store_2, "w", 60), engine, shards, write_s=0.05) as worker:
        worker.run()
    for number, (begun, _) in enumerate(engine.spans):
        committed = sum(end <= begun for _, end in writes)
        assert number - committed <= 2


def test_the_last_shard_is_not_waited_for_as_if_it_were_anothers(
    store: Store, new_worker: Callable[..., CaptureWorker]
) -> None:
    waits: list[float] = []
    board = LeaseBoard(store, "w", 60)
    with new_worker(board, Engine(), shards_of(2), write_s=0.1) as worker:
        worker.run(wait=waits.append)
    assert waits == []


def test_the_disk_is_said_to_be_almost_full_before_the_teacher_works(
    store: Store, new_worker: Callable[..., CaptureWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    board, engine, shards = LeaseBoard(store, "w", 60), Engine(), shards_of(4)
    worker = new_worker(board, engine, shards, bytes_per_token=1e6)
    free = iter([10**9, 10**9, 50_000_000])  # two shards of 30 tokens and 1 MB need 60 MB
    monkeypatch.setattr(store, "free_bytes", lambda: next(free))
    wanted = r"almost full .shard train-.* needs about 57.2 MiB .*, 47.7 MiB are free"
    with pytest.raises(StoreError, match=wanted), worker:
        worker.run()
    assert engine.calls == 2
    assert len(store.list("_meta/shards")) == 2, "what was captured is committed first"
    assert all(b"given up" in store.read(f"{LEASES}/{name}") for name in store.list(LEASES))
    assert board.attempts(), "the shard that was not captured is free at once"


def test_an_overtaken_worker_does_not_write_over_what_is_there(
    store: Store, new_worker: Callable[..., CaptureWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    board, shards = LeaseBoard(store, "w", 60), shards_of(1)
    worker = new_worker(board, Engine(), shards)
    commits: list[ShardRecord] = []
    real = worker_module.commit_shard

    def commit(store: Store, record: ShardRecord, data: bytes) -> None:
        commits.append(record)
        real(store, record, data)

    monkeypatch.setattr(worker_module, "commit_shard", commit)
    with worker:
        for _ in range(2):
            lease = board.try_lease("train-00000", None)
            assert lease is not None
            worker.make(shards[0], lease)
            worker.flush()
            assert len(commits) == 1
    assert store.list(LEASES) == []


def test_an_overtaken_worker_does_not_contradict_the_list_of_quarantined_rows(
    store: Store, new_worker: Callable[..., CaptureWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its columns are those of three rows, the list by now names one of them."""
    board, shards = LeaseBoard(store, "w", 60), shards_of(1)
    worker = new_worker(board, Engine(), shards)
    real = Engine.capture

    def paused(self: Engine, requests: Any, **options: Any) -> Any:
        columns = real(self, requests, **options)
        quarantine_rows(store, "train-00000", [QuarantinedRow(row_id(0, 1), "failed elsewhere", 2)])
        return columns

    monkeypatch.setattr(Engine, "capture", paused)
    lease = board.try_lease("train-00000", None)
    assert lease is not None
    with worker:
        worker.make(shards[0], lease)
        worker.flush()
        assert store.list("_meta/shards") == []
        assert b"given up" in store.read(lease.path), "the shard is free at once"
        # The next attempt goes by the list.
        worker.run()
    assert len(store.list("_meta/shards")) == 1
    record = read_record(store, "train", 0)
    assert record is not None
    assert record.rows == 2


def test_rows_of_an_earlier_attempt_do_not_count_twice_against_the_limit(
    store: Store, new_worker: Callable[..., CaptureWorker]
) -> None:
    """One row is allowed; the attempt that died had listed it, this one finds it beside another."""
    board, shards = LeaseBoard(store, "w", 60), shards_of(1)
    quarantine_rows(store, "train-00000", [QuarantinedRow(row_id(0, 0), "failed before", 2)])
    engine = Engine(raises=[row_id(0, 0), row_id(0, 1)])
    with new_worker(board, engine, shards, most=0.7) as worker:  # two of three rows
        worker.run()
    assert {row.sample_id for row in read_quarantined_rows(store, "train-00000")} == {
        row_id(0, 0),
        row_id(0, 1),
    }


def test_rows_of_other_shards_count_against_the_limit(
    store: Store, new_worker: Callable[..., CaptureWorker]
) -> None:
    shards = shards_of(2)
    quarantine_rows(store, "train-00001", [QuarantinedRow(row_id(1, 0), "failed before", 2)])
    engine = Engine(raises=[row_id(0, 0), row_id(1, 0)])
    worker = new_worker(LeaseBoard(store, "w", 60), engine, shards)
    with pytest.raises(ModelError, match=r"2 of 6 rows fail.*at most 1"), worker:
        worker.run()


def test_listings_stay_few_where_shards_are_many_and_long(
    store: Store, new_worker: Callable[..., CaptureWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = shards_of(200)
    worker = new_worker(LeaseBoard(store, "w", 60), Engine(), shards)
    lists: list[str] = []
    real = store.list
    monkeypatch.setattr(store, "list", lambda folder: (lists.append(folder), real(folder))[1])
    with worker:
        worker.run()
    # Of the leases one before each shard; of the records one more when a shard is leased, and one
    # when it is written.
    assert lists.count(LEASES) <= 201 + 5
    assert len(lists) <= 4 * 201 + 10


def test_waiting_for_others_ends_when_they_are_done(
    store: Store, new_worker: Callable[..., CaptureWorker]
) -> None:
    shards = shards_of(3)
    other = LeaseBoard(store, "other", 60)
    theirs = other.try_lease("train-00001", None)
    assert theirs is not None
    engine = Engine()
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            with new_worker(other, Engine(), shards) as their_worker:
                their_worker.make(shards[1], theirs)
                their_worker.flush()

    with new_worker(LeaseBoard(store, "w", 60), engine, shards) as worker:
        worker.run(wait=wait)
    assert len(waits) == 3
    assert engine.calls == 2
    assert len(store.list("_meta/shards")) == 3


def test_a_stuck_writer_does_not_keep_the_process(
    store: Store, new_worker: Callable[..., CaptureWorker]
) -> None:
    board, shards = LeaseBoard(store, "w", 60), shards_of(2)
    worker = new_worker(board, Engine(), shards, write_s=60)
    lease = board.try_lease("train-00000", None)
    assert lease is not None

    def stop_in_the_middle() -> None:
        with worker:
            worker.make(shards[0], lease)
            raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stop_in_the_middle()
    assert time.monotonic() - begun < 15
    assert all(t.daemon for t in threading.enumerate() if t.name == "cache-writer")


def test_row_after_row_begins_after_as_many_bad_ends_as_tries(
    store: Store, new_worker: Callable[..., CaptureWorker]
) -> None:
    """Two; an attempt that was given up on purpose is none of them."""
    board, shards = LeaseBoard(store, "w", 60), shards_of(1)
    worker = new_worker(board, Engine(), shards)
    marked: list[bool] = []
    for attempt, badly in enumerate([True, False, True, True]):
        lease = board.try_lease("train-00000", attempt - 1 if attempt else None)
        assert lease is not None
        marked.append(worker._marker(shards[0], lease) is not None)
        board.give_up(lease, badly=badly)
    assert marked == [False, False, False, True]


def test_a_worker_whose_engine_is_lost_says_that_the_shard_ended_badly(
    store: Store, new_worker: Callable[..., CaptureWorker]
) -> None:
    for error, ended in ((EngineLost("gone"), b"failed"), (KeyboardInterrupt(), b"given up")):
        board = LeaseBoard(store, "w", 60)
        lease = board.try_lease(f"train-{ended.decode()}", None)
        assert lease is not None
        worker = new_worker(board, Engine(), shards_of(1))
        with pytest.raises(type(error)), worker:
            raise error
        assert ended in store.read(lease.path)


def test_of_two_lists_the_one_with_more_failed_rows_counts(store: Store) -> None:
    """A list of fewer rows is of a worker that died before its record; nothing was made by it."""
    one, two = (QuarantinedRow(row_id(0, number), "failed", 2) for number in (0, 1))
    lists = QuarantineLists(store, planned_rows=lambda: 3, max_fraction=1.0)
    quarantine_rows(store, "train-00000", [one])
    assert lists.read_other("train-00000", Answered([], (one, two))) == ()
    assert lists.read("train-00000") == ()
    quarantine_rows(store, "train-00000", [one, two])
    assert lists.read_other("train-00000", Answered([], (one,))) == (one, two)
    assert lists.read("train-00000") == (one, two)
