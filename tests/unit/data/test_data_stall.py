"""A store that stalls: a wait that is measured, a line that names the file, an end in words."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.data.settings import DataSettings
from pipeline.data.stream.prefetch import Patience, Prefetcher
from pipeline.data.stream.read_ahead import ReadAhead
from pipeline.data.stream.train_stream import TrainStream
from pipeline.errors import StoreError


def make_stream(source: Any, **changes: Any) -> TrainStream:
    return TrainStream(
        source, DataSettings(shuffle_shards=2, **changes), seed=3, packs_per_step=8, rank=0,
        world_size=1, accumulation=1, pack_length=16, temperature=1.0,
    )  # fmt: skip


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Let hanging threads go at the end."""
    event = threading.Event()
    yield event
    event.set()


def test_a_store_that_hangs_ends_in_words(
    make_source: Callable[..., Any], release: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_source([20, 20, 20])
    source.hanging = ["s3://bucket/cache/data/train/00007.parquet"]
    real = source.read_rows

    def read_rows(shard: int, rows: Any) -> Any:
        if source.calls >= 3:
            release.wait()
        return real(shard, rows)

    source.read_rows = read_rows
    stream = make_stream(source, stall_warning_s=0.1, stall_timeout_s=0.5)
    started = time.monotonic()
    with (
        caplog.at_level(logging.WARNING, logger="pipeline.data.stream.prefetch"),
        pytest.raises(StoreError) as caught,
    ):
        list(stream.steps(0, 100))
    assert time.monotonic() - started < 5, "it does not wait for the thread that hangs"
    assert str(caught.value) == (
        "no data for 0.5 s: reading s3://bucket/cache/data/train/00007.parquet; expected a step's "
        "rows within 0.5 s (data.stall_timeout_s); check the store or the mount, then run the same "
        "command again; it goes on from the last complete checkpoint."
    )
    lines = [record.getMessage() for record in caplog.records]
    # After 0.1, 0.2 and 0.4 s: a stall of an hour must not fill the log.
    assert len(lines) == 3
    assert all(source.hanging[0] in line for line in lines)
    assert stream.wait_seconds > 0.4


def test_a_slow_store_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    def slow() -> Iterator[int]:
        for number in range(2):
            time.sleep(0.2)
            yield number

    patience = Patience(0.05, 10, lambda: "reading a file")
    with (
        caplog.at_level(logging.WARNING, logger="pipeline.data.stream.prefetch"),
        Prefetcher(slow(), ahead=1, patience=patience) as items,
    ):
        assert list(items) == [0, 1]
        assert items.wait_seconds > 0.3
    assert "waiting for data for 0.05 s: reading a file" in caplog.text


def test_shards_are_read_ahead_in_the_order_of_their_use(make_source: Callable[..., Any]) -> None:
    """Those in use first, then the next of each lane; after an epoch the next one's first."""
    source = make_source([30] * 12)
    stream = make_stream(source, read_threads=1, prefetch_batches=1, lanes=2)
    plan, lanes = stream.plan, range(2)
    with stream.iterate() as steps:
        next(steps)
        deadline = time.monotonic() + 10
        while len(set(source.opened)) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    ahead = plan.shards_ahead(0, lanes, steps=32)
    # In which order depends on how far the steps have come meanwhile.
    assert set(source.opened) >= set(ahead)
    assert len(set(ahead)) == 4
    # Those of the first step are in use; a lane's next shard comes when it is near.
    assert plan.shards_ahead(0, lanes, steps=0) == ahead[:2]
    uses = [
        {pack.shard for pack in plan.step(step).packs} for step in range(2 * plan.steps_per_epoch)
    ]
    first = [next(step for step, use in enumerate(uses) if shard in use) for shard in ahead]
    assert first == sorted(first)
    for step, use in enumerate(uses):
        assert use <= set(plan.shards_ahead(step, lanes, steps=0))
        assert (
            set(plan.shards_ahead(step, lanes, steps=1)) >= use | uses[min(step + 1, len(uses) - 1)]
        )


def test_reading_ahead_leaves_errors_to_the_reader() -> None:
    opened: list[int] = []
    done = threading.Event()

    def open_shard(shard: int) -> None:
        opened.append(shard)
        if shard == 3:
            done.set()
        raise OSError("gone")

    ahead = ReadAhead(open_shard, threads=1)
    ahead.want([1, 2, 3])
    ahead.want([1, 2, 3])
    assert done.wait(5)
    ahead.close()
    time.sleep(0.05)
    assert opened == [1, 2, 3]
    names = [thread.name for thread in threading.enumerate()]
    assert "data-read-0" not in names
