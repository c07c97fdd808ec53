"""The worker's loop: writes overlap the teacher, one shard waits, room is asked for beforehand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache.io.writer import commit_shard
from pipeline.cache.layout.manifest import ShardRecord, checksum, shard_name
from pipeline.corpus.sample import Sample
from pipeline.corpus.table import SampleTable
from pipeline.errors import ModelError, StoreError
from pipeline.observe.progress import Progress
from pipeline.storage import Store
from pipeline.teacher.capture.plan import PlannedShard
from pipeline.teacher.capture.worker import ShardMaker, make_all
from pipeline.teacher.engines.base import CaptureRequest
from pipeline.teacher.engines.transformers import TransformersEngine, padding_share
from pipeline.teacher.fleet.leases import CLAIMS, ClaimBoard
from pipeline.teacher.fleet.quarantine import GuardedEngine

ROWS, TOKENS = 3, 10


def _shards(count: int) -> list[PlannedShard]:
    def sample(shard: int, row: int) -> Sample:
        loss_mask = np.arange(TOKENS) > 3
        name = f"{shard:016x}{row:016x}"
        return Sample(name, "train", np.arange(TOKENS, dtype=np.int32), loss_mask, shard, row)

    return [
        PlannedShard("train", index, SampleTable.of([sample(index, row) for row in range(ROWS)]))
        for index in range(count)
    ]


def _requests(shard: PlannedShard) -> list[CaptureRequest]:
    return [
        CaptureRequest(s.sample_id, s.input_ids, np.flatnonzero(s.loss_mask) - 1)
        for s in shard.samples
    ]


class Engine:
    """Answers with zeros; counts what it has handed out and is still held."""

    vocab_size = 32

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.spans: list[tuple[float, float]] = []
        self.calls = 0

    def capture(self, requests: Any, *, on_tokens: Callable[[int], None] | None = None) -> Any:
        self.calls += 1
        begun = time.monotonic()
        time.sleep(self.seconds)
        self.spans.append((begun, time.monotonic()))
        if on_tokens is not None:
            on_tokens(sum(r.input_ids_L.size for r in requests))
        return [np.zeros((r.rows_N.size, 4), np.float32) for r in requests]

    def close(self) -> None:
        return


def _maker(
    store: Store, board: ClaimBoard, engine: Engine, shards: list[PlannedShard], **options: Any
) -> tuple[ShardMaker, list[tuple[float, float]]]:
    writes: list[tuple[float, float]] = []
    pause = options.pop("write_s", 0.0)

    def write(shard: PlannedShard, columns: Any, failed: frozenset[str]) -> ShardRecord:
        begun = time.monotonic()
        time.sleep(pause)
        data = f"{shard.name} without {len(failed)}".encode()
        record = ShardRecord(
            split="train", index=shard.index, path=shard_name("train", shard.index),
            rows=len(columns), tokens=ROWS * TOKENS, loss_tokens=1, entries=1, bytes=len(data),
            xxh3_128=checksum(data), kept_mass=1.0, entropy=0.0,
        )  # fmt: skip
        commit_shard(store, record, data)
        writes.append((begun, time.monotonic()))
        return record

    settings: dict[str, Any] = {"tries": 2, "most_failed": 1, "bytes_per_token": 0.0, **options}
    progress = Progress(None, enabled=False)
    maker = ShardMaker(lambda: engine, _requests, write, board, progress, shards=shards, **settings)
    return maker, writes


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "cache"))


def _overlap(span: tuple[float, float], others: list[tuple[float, float]]) -> float:
    return sum(max(0.0, min(span[1], b) - max(span[0], a)) for a, b in others)


def test_writes_overlap_the_teacher_and_one_shard_waits(store: Store) -> None:
    board, engine, shards = ClaimBoard(store, "w", 60), Engine(0.3), _shards(5)
    maker, writes = _maker(store, board, engine, shards, write_s=0.3)
    with maker:
        make_all(shards, board, maker)
    # Each write but the last runs while the teacher has the next shard.
    overlapped = [_overlap(span, engine.spans) / (span[1] - span[0]) for span in writes[:-1]]
    assert min(overlapped) > 0.5
    # A slow store holds the teacher back: never more than two shards between call and commit.
    engine, store_2 = Engine(0.0), Store(f"{store.root}-slow")
    board = ClaimBoard(store_2, "w", 60)
    maker, writes = _maker(store_2, board, engine, shards, write_s=0.05)
    with maker:
        make_all(shards, board, maker)
    for number, (begun, _) in enumerate(engine.spans):
        committed = sum(end <= begun for _, end in writes)
        assert number - committed <= 2


def test_the_disk_is_said_to_be_almost_full_before_the_teacher_works(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    board, engine, shards = ClaimBoard(store, "w", 60), Engine(), _shards(4)
    maker, _ = _maker(store, board, engine, shards, bytes_per_token=1000.0)
    free = iter([10**9, 10**9, 50_000])  # two shards of 30 tokens and 1,000 bytes need 60,000
    monkeypatch.setattr(store, "free_bytes", lambda: next(free))
    wanted = r"almost full .shard train-.* needs about 0.1 MB.*free"
    with pytest.raises(StoreError, match=wanted), maker:
        make_all(shards, board, maker)
    assert engine.calls == 2
    assert len(store.list("_meta/shards")) == 2, "what was captured is committed first"
    assert all(b"given up" in store.read(f"{CLAIMS}/{name}") for name in store.list(CLAIMS))
    assert board.attempts(), "the shard that was not made is free at once"


def test_an_overtaken_worker_does_not_write_over_what_is_there(store: Store) -> None:
    board, engine, shards = ClaimBoard(store, "w", 60), Engine(), _shards(1)
    maker, writes = _maker(store, board, engine, shards)
    claim = board.try_claim("train-00000", None)
    assert claim is not None
    with maker:
        maker.make(shards[0], claim)
        maker.flush()
        assert len(writes) == 1
        again = board.try_claim("train-00000", None)
        assert again is not None
        maker.make(shards[0], again)
        maker.flush()
        assert len(writes) == 1
    assert store.list(CLAIMS) == []


def test_listings_stay_few_where_shards_are_many_and_long(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    board, engine, shards = ClaimBoard(store, "w", 60), Engine(), _shards(200)
    maker, _ = _maker(store, board, engine, shards)
    lists: list[str] = []
    real = store.list
    monkeypatch.setattr(store, "list", lambda folder: (lists.append(folder), real(folder))[1])
    with maker:
        make_all(shards, board, maker)
    assert len(lists) <= 2 * 201 + 10


def test_waiting_for_others_ends_when_they_are_done(store: Store) -> None:
    shards = _shards(3)
    other = ClaimBoard(store, "other", 60)
    theirs = other.try_claim("train-00001", None)
    assert theirs is not None
    board, engine = ClaimBoard(store, "w", 60), Engine()
    maker, _ = _maker(store, board, engine, shards)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            their_maker, _ = _maker(store, other, Engine(), shards)
            with their_maker:
                their_maker.make(shards[1], theirs)
                their_maker.flush()

    with maker:
        make_all(shards, board, maker, wait=wait)
    assert len(waits) == 3
    assert engine.calls == 2
    assert len(store.list("_meta/shards")) == 3


def test_tokens_are_reported_once_however_often_they_are_computed() -> None:
    class Flaky(Engine):
        def capture(self, requests: Any, *, on_tokens: Any = None) -> Any:
            if self.calls < 2:
                self.calls += 1
                on_tokens(20)
                raise RuntimeError("in passing")
            return super().capture(requests, on_tokens=on_tokens)

    told: list[int] = []
    guarded = GuardedEngine(Flaky(), tries=3, elsewhere=list)
    answered = guarded.capture(_requests(_shards(1)[0]), on_tokens=told.append)
    assert answered.failed == ()
    assert told == [20, 10]


def test_an_engine_that_fails_only_for_the_whole_is_said_so() -> None:
    class Small(Engine):
        def capture(self, requests: Any, *, on_tokens: Any = None) -> Any:
            if len(requests) == ROWS:
                raise RuntimeError("out of memory")
            return super().capture(requests)

    guarded = GuardedEngine(Small(), tries=2, elsewhere=list)
    with pytest.raises(ModelError, match=r"fails for 3 rows together.*out of memory.*lower"):
        guarded.capture(_requests(_shards(1)[0]))


def test_a_stuck_writer_does_not_keep_the_process(store: Store) -> None:
    board, shards = ClaimBoard(store, "w", 60), _shards(2)
    maker, _ = _maker(store, board, Engine(), shards, write_s=60)
    claim = board.try_claim("train-00000", None)
    assert claim is not None

    def stop_in_the_middle() -> None:
        with maker:
            maker.make(shards[0], claim)
            raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stop_in_the_middle()
    assert time.monotonic() - begun < 15
    assert all(t.daemon for t in threading.enumerate() if t.name == "cache-writer")


def test_nearly_no_token_is_padding_whatever_the_order() -> None:
    draw = np.random.default_rng(3)
    requests = [
        CaptureRequest(str(n), np.zeros(size, np.int32), np.zeros(1, np.int64))
        for n, size in enumerate(draw.integers(5, 400, 500))
    ]
    engine = TransformersEngine.__new__(TransformersEngine)
    engine._batch_tokens = 2048
    batches = list(engine._batches(requests))
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    assert padding_share(requests, batches) < 0.03
    in_order = [list(range(start, start + 5)) for start in range(0, 500, 5)]
    assert padding_share(requests, in_order) > 0.3
