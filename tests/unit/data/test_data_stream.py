"""The stream: ranks, resume, threads; and the held-out batches."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cache.io.reader import open_cache
from pipeline.data.collate import Batch
from pipeline.data.settings import DataSettings
from pipeline.data.stream.prefetch import Prefetcher
from pipeline.data.stream.train_stream import StepBatch, TrainStream
from pipeline.errors import ConfigError
from tests.unit.cache.sample_cache import write_cache
from tests.unit.data.heldout_batches import heldout_batches

MakeSource = Callable[..., Any]


def make_stream(source: Any, **changes: Any) -> TrainStream:
    """Return a stream with small numbers."""
    settings = DataSettings(shuffle_shards=2, prefetch_batches=2)
    options: dict[str, Any] = {
        "seed": 3,
        "packs_per_step": 8,
        "rank": 0,
        "world_size": 1,
        "accumulation": 1,
        "pack_length": 16,
        "temperature": 2.0,
    }
    return TrainStream(source, changes.pop("settings", settings), **{**options, **changes})


def steps_of(stream: TrainStream, start: int, count: int) -> list[StepBatch]:
    """Return some steps and stop the thread."""
    with stream.iterate(start) as steps:
        return list(islice(steps, count))


def same(a: Batch, b: Batch) -> bool:
    """Bitwise equality of all tensors and the rest."""
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in ((getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch))
    )


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 2), (1, 8), (2, 1), (2, 2), (4, 1)])
def test_ranks_share_the_same_global_batches(
    make_source: MakeSource, world_size: int, accumulation: int
) -> None:
    """The union over ranks, in order, is what one rank would do alone; counts are global."""
    source = make_source([20, 31, 7, 11])
    alone = make_stream(source)
    count = 2 * alone.steps_per_epoch
    expected = steps_of(alone, 0, count)
    ranks = [
        steps_of(
            make_stream(source, rank=rank, world_size=world_size, accumulation=accumulation),
            0,
            count,
        )
        for rank in range(world_size)
    ]
    for i, whole in enumerate(expected):
        parts = [batch for rank in ranks for batch in rank[i].micro_batches]
        assert len(parts) == world_size * accumulation
        full = [part for part in parts if part.num_sequences]
        (batch,) = whole.micro_batches
        assert sum((part.sample_ids for part in full), ()) == batch.sample_ids
        ids = torch.cat([part.input_ids_1T for part in full], dim=1)
        assert torch.equal(ids, batch.input_ids_1T)
        assert torch.equal(torch.cat([p.label_ids_N for p in full]), batch.label_ids_N)
        for rank in ranks:
            assert rank[i].num_loss_tokens == whole.num_loss_tokens
            assert rank[i].num_tokens == whole.num_tokens
        assert sum(part.num_loss_tokens for part in parts) == whole.num_loss_tokens
        assert sum(part.num_tokens for part in parts) == whole.num_tokens


def test_short_last_step_gives_every_rank_as_many_micro_batches(make_source: MakeSource) -> None:
    """Ranks without work get empty batches."""
    source = make_source([9])
    settings = DataSettings(packing=False)
    for rank in range(4):
        stream = make_stream(source, rank=rank, world_size=4, accumulation=2, settings=settings)
        assert stream.steps_per_epoch == 2
        last = steps_of(stream, 1, 1)[0]
        assert len(last.micro_batches) == 2
    sizes = [b.num_sequences for b in last.micro_batches]
    assert sizes == [0, 1]


def test_resume_is_exact_and_reads_nothing_before(make_source: MakeSource) -> None:
    """From any step, over the end of an epoch; the very same tensors."""
    source = make_source([20, 31, 7, 11])
    stream = make_stream(source)
    total = 2 * stream.steps_per_epoch + 1
    expected = steps_of(stream, 0, total)
    for start in range(total):
        source.reads.clear()
        stream = make_stream(source)
        assert source.reads == []  # planning reads no row
        with stream.iterate(start, total) as steps:
            got = list(steps)
        assert [step.step for step in got] == list(range(start, total))
        for a, b in zip(got, expected[start:], strict=True):
            assert (a.epoch, a.num_tokens) == (b.epoch, b.num_tokens)
            assert same(a.micro_batches[0], b.micro_batches[0])
        planned = [
            (pack.shard, row)
            for step in range(start, total)
            for pack in stream.plan.step(step).packs
            for row in pack.rows
        ]
        assert sorted(source.reads) == sorted(planned)


def test_one_read_per_shard_and_step(make_source: MakeSource) -> None:
    """Scattered rows of a shard are asked for together."""
    source = make_source([20, 20])
    stream = make_stream(source)
    with stream.iterate(0, 1) as steps:
        list(steps)
    assert source.calls <= 2


def test_error_of_the_thread_surfaces_after_good_steps(make_source: MakeSource) -> None:
    """The consumer sees the exception itself, in its turn."""
    source = make_source([20, 20])
    source.fail_after = 2
    steps = make_stream(source, packs_per_step=1).iterate()
    next(steps)
    next(steps)
    with pytest.raises(OSError, match="disk is gone"):
        next(steps)
    assert list(steps) == []
    assert not prefetch_threads()


def prefetch_threads() -> list[threading.Thread]:
    """Return the prefetching threads that are alive."""
    return [thread for thread in threading.enumerate() if thread.name == "data-prefetch"]


def test_close_stops_the_thread_and_bounds_the_lead(make_source: MakeSource) -> None:
    """A full queue holds the thread; closing releases it; a second iterate replaces the first."""
    source = make_source([30, 30])
    stream = make_stream(source, packs_per_step=1)
    steps = stream.iterate()
    next(steps)
    time.sleep(0.2)
    assert source.calls <= 1 + 2 + 1  # taken, queued, in hand
    assert len(prefetch_threads()) == 1
    stream.iterate()
    assert len(prefetch_threads()) == 1
    stream.close()
    stream.close()
    assert not prefetch_threads()
    assert list(steps) == []


def test_wait_is_measured() -> None:
    """A slow source shows up as waiting; a slow consumer does not."""

    def slow() -> Any:
        for i in range(3):
            time.sleep(0.05)
            yield i

    with Prefetcher(slow(), ahead=1) as items:
        assert list(items) == [0, 1, 2]
        assert items.wait_seconds >= 0.1
    with Prefetcher(iter(range(3)), ahead=3) as items:
        time.sleep(0.1)
        assert next(items) == 0
        assert items.wait_seconds < 0.05


@pytest.mark.slow
def test_memory_is_flat_over_epochs(tmp_path: Path) -> None:
    """Less than half a kB an epoch, which is noise; numpy tells tracemalloc what it holds."""
    url = str(tmp_path / "cache")
    write_cache(url)
    stream = make_stream(open_cache(url).source("train"), packs_per_step=2, pack_length=64)
    held: dict[int, int] = {}
    tracemalloc.start()
    try:
        for step in stream.steps(0, 204 * stream.steps_per_epoch):
            if step.epoch in (3, 203) and step.epoch not in held:
                gc.collect()
                held[step.epoch] = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert stream.steps_per_epoch > 1
    assert held[203] < held[3] + 100_000


def test_refusals(make_source: MakeSource) -> None:
    """A step that does not divide; a temperature that is not cached."""
    source = make_source([5])
    with pytest.raises(ConfigError, match="multiple of 3"):
        make_stream(source, world_size=3)
    steps = make_stream(source, temperature=1.5).iterate()
    with pytest.raises(ConfigError, match="one of 1, 2"):
        next(steps)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_heldout_in_file_order(make_source: MakeSource, world_size: int) -> None:
    """Every row once; batches independent of the ranks; equal numbers on all ranks."""
    source = make_source([7, 0, 5, 9])
    ranks = [
        list(
            heldout_batches(
                source, tokens_per_batch=24, temperature=1.0, rank=rank, world_size=world_size
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    dealt = [batch for rank in ranks for batch in rank]
    full = [batch for batch in dealt if batch.num_sequences]
    every = [s.sample_id for shard in source.rows for s in shard]
    assert [sample for batch in full for sample in batch.sample_ids] == every
    assert all(batch.num_tokens <= 24 for batch in full)
    assert len(dealt) - len(full) < world_size


def test_heldout_row_longer_than_a_batch(make_source: MakeSource) -> None:
    """It is a batch of its own rather than an error."""
    source = make_source([4], longest=12)
    batches = list(heldout_batches(source, tokens_per_batch=1, temperature=1.0))
    assert [batch.num_sequences for batch in batches] == [1] * 4


@pytest.mark.parametrize(
    ("packs", "world_size", "accumulation", "fits"),
    [(8, 2, 4, True), (4, 2, 4, False), (6, 2, 2, False), (12, 2, 3, True)],
)
def test_a_step_divides_among_ranks_and_micro_batches(
    make_source: MakeSource, packs: int, world_size: int, accumulation: int, fits: bool
) -> None:
    """By the ranks alone is not enough: a micro-batch of a rank would be without packs."""
    options = {"packs_per_step": packs, "world_size": world_size, "accumulation": accumulation}
    source = make_source([20])
    if fits:
        make_stream(source, **options)
        return
    with pytest.raises(ConfigError) as caught:
        make_stream(source, **options)
    assert f"a multiple of {world_size * accumulation}" in str(caught.value)
