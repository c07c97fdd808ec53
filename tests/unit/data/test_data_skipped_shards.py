"""Damaged shards: stop with the name, or the same smaller steps on every rank, resumed exactly."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cache.io.reader import ShardDamaged, open_cache
from pipeline.data.order.plan import TrainPlan
from pipeline.data.settings import DataSettings
from pipeline.data.stream.skipped_shards import (
    SKIPPED_SHARDS_FILE,
    SkippedShard,
    read_skipped_shards,
    write_skipped_shards,
)
from pipeline.data.stream.train_stream import StepBatch, TrainStream
from pipeline.errors import CacheError, ResumeError, StoreError
from tests.unit.cache.sample_cache import write_cache

MakeSource = Callable[..., Any]


def make_stream(source: Any, *, rank: int = 0, world_size: int = 1, **changes: Any) -> TrainStream:
    options = {"shuffle_shards": 2, "prefetch_batches": 3, "on_damaged_shard": "skip", **changes}
    return TrainStream(
        source, DataSettings(**options), seed=3, packs_per_step=8, rank=rank, world_size=world_size,
        accumulation=1, pack_length=16, temperature=1.0,
    )  # fmt: skip


class Agreement:
    """What the engine's collectives do, between threads."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size)
        self._found: list[SkippedShard] = []
        self._world_size = world_size

    def __call__(self, mine: Sequence[SkippedShard]) -> list[SkippedShard]:
        self._found += mine
        self._barrier.wait(20)
        every = list(self._found)
        if self._barrier.wait(20) == 0:
            self._found.clear()
        self._barrier.wait(20)
        return every


def run_ranks(
    make_source: MakeSource, world_size: int, damaged: set[int], total: int, **changes: Any
) -> tuple[list[list[StepBatch]], list[TrainStream]]:
    """Run all ranks of one training over sources of their own, equally damaged."""
    agree = Agreement(world_size)

    def one(rank: int) -> tuple[list[StepBatch], TrainStream]:
        source = make_source([20, 31, 7, 11])
        source.damaged = damaged
        stream = make_stream(source, rank=rank, world_size=world_size, **changes)
        return list(stream.steps(0, total, agree=agree)), stream

    with ThreadPoolExecutor(world_size) as pool:
        done = list(pool.map(one, range(world_size)))
    return [steps for steps, _ in done], [stream for _, stream in done]


def samples(steps: Sequence[StepBatch]) -> list[list[str]]:
    return [[s for b in step.micro_batches for s in b.sample_ids] for step in steps]


@pytest.mark.parametrize("changes", [{}, {"batch_tokens": 60}])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_leaves_out_the_same(
    make_source: MakeSource, world_size: int, changes: dict[str, Any]
) -> None:
    """The global batches are those of the plan without the shards' rows, on any ranks."""
    damaged = {1, 3}
    whole = make_stream(make_source([20, 31, 7, 11]), **changes)
    total = 2 * whole.steps_per_epoch
    expected = [
        [s for s in step if int(s[:16], 16) not in damaged]
        for step in samples(list(whole.steps(0, total)))
    ]
    ranks, streams = run_ranks(make_source, world_size, damaged, total, **changes)
    assert [
        [s for part in parts for s in part] for parts in zip(*map(samples, ranks), strict=True)
    ] == expected
    for rank in ranks:
        assert [step.step for step in rank] == list(range(total))
        assert not any(step.damaged for step in rank)
        for step, parts in zip(rank, zip(*ranks, strict=True), strict=True):
            batches = [batch for part in parts for batch in part.micro_batches]
            assert step.num_loss_tokens == sum(b.num_loss_tokens for b in batches)
            assert step.num_tokens == sum(b.num_tokens for b in batches)
        assert sum(step.num_skipped_rows for step in rank) == 2 * (31 + 11)
    assert {record.shard for record in streams[0].skipped_shards} == damaged
    # The first step that would have used the shard, whatever the number of ranks.
    (alone,) = run_ranks(make_source, 1, damaged, total, **changes)[1]
    firsts = {record.shard: record.from_step for record in alone.skipped_shards}
    for stream in streams:
        assert {r.shard: r.from_step for r in stream.skipped_shards} == firsts


def test_a_run_that_goes_on_does_the_same_without_looking(
    make_source: MakeSource, tmp_path: Path
) -> None:
    """From any step, with the file alone; also when the shard has been repaired meanwhile."""
    (expected,), (stream,) = run_ranks(make_source, 1, {1}, 12)
    write_skipped_shards(tmp_path, stream.skipped_shards)
    for start in range(1, 12):
        source = make_source([20, 31, 7, 11])
        resumed = make_stream(source)
        resumed.skip_shards(read_skipped_shards(tmp_path))
        got = list(resumed.steps(start, 12))
        first = stream.skipped_shards[0].from_step
        assert all(shard != 1 for shard, _ in source.reads) or start < first
        assert samples(got) == samples(expected[start:])
        for a, b in zip(got, expected[start:], strict=True):
            assert a.num_loss_tokens == b.num_loss_tokens
            for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
                for field in fields(x):
                    mine, theirs = getattr(x, field.name), getattr(y, field.name)
                    if isinstance(mine, torch.Tensor):
                        assert torch.equal(mine, theirs), field.name


def test_one_rank_finds_it_alone(make_source: MakeSource) -> None:
    """A copy on one node's disk is whole, another's is not: they agree all the same."""
    agree = Agreement(2)

    def one(rank: int) -> list[StepBatch]:
        source = make_source([20, 31, 7, 11])
        source.damaged = {1} if rank else set()
        return list(make_stream(source, rank=rank, world_size=2).steps(0, 8, agree=agree))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(one, range(2))
    for a, b in zip(first, second, strict=True):
        assert a.num_loss_tokens == b.num_loss_tokens
        loss_tokens = sum(x.num_loss_tokens for step in (a, b) for x in step.micro_batches)
        assert loss_tokens == a.num_loss_tokens
    assert sum(step.num_skipped_rows for step in first) > 0


def test_stop_names_the_shard(make_source: MakeSource) -> None:
    source = make_source([20, 31, 7, 11])
    source.damaged = {2}
    with pytest.raises(ShardDamaged, match="shard-2: shard damaged: a bit flipped"):
        list(make_stream(source, on_damaged_shard="stop").steps(0, 8))


def test_nothing_left_stops(make_source: MakeSource) -> None:
    source = make_source([5, 0, 6])
    source.damaged = {0, 2}
    with pytest.raises(CacheError, match="every training shard is damaged"):
        list(make_stream(source).steps(0, 8))


def test_a_mount_that_is_gone_is_no_damage(tmp_path: Path) -> None:
    """Else the run would leave out shard after shard while somebody mounts it again."""
    write_cache(str(tmp_path / "cache"))
    stream = make_stream(open_cache(str(tmp_path / "cache")).source("train"), pack_length=64)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(
        StoreError, match="the cache no longer exists at this address; mount or restore it"
    ):
        list(stream.steps(0, 2))
    assert stream.skipped_shards == []


def test_waiting_is_supervised_over_restarts(make_source: MakeSource) -> None:
    """The loop takes differences, which must not be negative."""
    source = make_source([20, 31, 7, 11])
    source.damaged = {1}
    stream = make_stream(source)
    waits = [stream.wait_seconds for _ in stream.steps(0, 8)]
    assert waits == sorted(waits)


def test_the_file(tmp_path: Path) -> None:
    records = [
        SkippedShard(4, 7, "data/b", 2, "missing"),
        SkippedShard(1, 9, "data/a", 3, "flipped"),
    ]
    assert read_skipped_shards(tmp_path) == []
    write_skipped_shards(tmp_path, records)
    assert read_skipped_shards(tmp_path) == sorted(records)
    write_skipped_shards(tmp_path, [])
    assert not (tmp_path / SKIPPED_SHARDS_FILE).exists()
    (tmp_path / SKIPPED_SHARDS_FILE).write_text('[{"shard": 1}]')
    with pytest.raises(ResumeError, match=r"skipped-shards\.json: not readable"):
        read_skipped_shards(tmp_path)


def test_steps_before_the_damage_was_found_are_what_they_were(make_source: MakeSource) -> None:
    """A run that goes on knows of it from the start; what it had trained on by then, it had."""

    def plan() -> TrainPlan:
        return TrainPlan(
            make_source([7, 9, 8]), seed=1, packs_per_step=2, pack_length=12, shuffle_shards=3,
            lanes=1,
        )  # fmt: skip

    whole, skipping = plan(), plan()
    skipping.skip_shard(1, 3)
    for step in range(3):
        assert skipping.step(step) == whole.step(step)
    later = range(3, whole.steps_per_epoch + 3)
    assert any(pack.shard == 1 for step in later for pack in whole.step(step).packs)
    assert not any(pack.shard == 1 for step in later for pack in skipping.step(step).packs)
