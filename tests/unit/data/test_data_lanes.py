"""Lanes: each rank reads its share; every number of ranks makes the same steps; totals are sums."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.writer import commit_shard
from pipeline.data.order.plan import TrainPlan
from pipeline.data.order.step import Pack, StepPlan, lanes_of_rank
from pipeline.data.order.window import Window
from pipeline.data.settings import DataSettings
from pipeline.data.stream.train_stream import TrainStream
from pipeline.storage import Store
from tests.unit.cache.sample_cache import finish, sample_identity, sample_shard

MakeSource = Callable[..., Any]


def make_plan(source: Any, **changes: Any) -> TrainPlan:
    options = {
        "seed": 0, "packs_per_step": 16, "pack_length": 16, "shuffle_shards": 4, "lanes": 64,
    }  # fmt: skip
    return TrainPlan(source, **{**options, **changes})


def epoch_of(plan: TrainPlan, epoch: int) -> list[StepPlan]:
    first = epoch * plan.steps_per_epoch
    return [plan.step(first + i) for i in range(plan.steps_per_epoch)]


def of_rank(steps: list[StepPlan], rank: int, world_size: int) -> list[tuple[Pack, ...]]:
    """Return the packs of one rank in each step."""
    return [
        sum(step.micro_batches(rank=rank, world_size=world_size, accumulation=2), ())
        for step in steps
    ]


SPLITS = st.lists(st.integers(0, 25), min_size=1, max_size=40).filter(sum)
BUDGETS = st.one_of(st.none(), st.integers(36, 2000))


@settings(max_examples=80, deadline=None)
@given(SPLITS, BUDGETS, st.booleans(), st.integers(1, 3), st.integers(0, 2**64))
def test_ranks_read_their_share_of_the_same_steps(
    make_source: MakeSource,
    shard_rows: list[int],
    batch_tokens: int | None,
    packing: bool,
    shuffle_shards: int,
    seed: int,
) -> None:
    """In any epoch a shard is read by one rank, but for those that a cut between ranks is in."""
    source = make_source(shard_rows)
    plan = make_plan(
        source, seed=seed, shuffle_shards=shuffle_shards, packing=packing,
        batch_tokens=batch_tokens,
    )  # fmt: skip
    shards = sum(rows > 0 for rows in shard_rows)
    for epoch in (0, 3):
        steps = epoch_of(plan, epoch)
        for world_size in (1, 2, 4, 8, 16):
            ranks = [of_rank(steps, rank, world_size) for rank in range(world_size)]
            for step, parts in zip(steps, zip(*ranks, strict=True), strict=True):
                assert sum(parts, ()) == step.packs
            if plan.lanes % world_size:
                continue
            read = sum(len({p.shard for packs in rank for p in packs}) for rank in ranks)
            assert read <= shards + world_size - 1


@settings(max_examples=60, deadline=None)
@given(SPLITS, BUDGETS, st.integers(0, 2**64), st.data())
def test_totals_are_those_of_the_steps(
    make_source: MakeSource,
    shard_rows: list[int],
    batch_tokens: int | None,
    seed: int,
    data: st.DataObject,
) -> None:
    """Tokens and skipped rows of the first n steps, without walking them; in any order."""
    source = make_source(shard_rows)
    plan = make_plan(source, seed=seed, batch_tokens=batch_tokens)
    total = 2 * plan.steps_per_epoch + 1
    for shard in data.draw(st.sets(st.integers(0, len(shard_rows) - 1), max_size=3)):
        plan.skip_shard(shard, data.draw(st.integers(0, total)))
    steps = [plan.step(step) for step in range(total)]
    for stop in data.draw(st.lists(st.integers(0, total), min_size=1, max_size=6)):
        assert plan.tokens_before(stop) == sum(step.num_tokens for step in steps[:stop])
        rows, _ = plan.skipped_before(stop)
        assert rows == sum(step.num_skipped_rows for step in steps[:stop])
        if stop < total:
            assert plan.step(stop) == steps[stop]


@settings(max_examples=60, deadline=None)
@given(SPLITS, st.integers(36, 3000), st.sampled_from([1, 8, 48, 64]), st.integers(0, 2**64))
def test_no_rank_is_above_its_share_of_a_budget(
    make_source: MakeSource, shard_rows: list[int], budget: int, lanes: int, seed: int
) -> None:
    """Each lane keeps to its own share, so a step does, and whatever ranks divide the lanes."""
    source = make_source(shard_rows)
    assume(budget >= 3 * source.lengths().max())
    plan = make_plan(source, seed=seed, batch_tokens=budget, lanes=lanes)
    tokens = {Pack(s, (r,)): len(row.input_ids_L) for s, rows in enumerate(source.rows)
              for r, row in enumerate(rows)}  # fmt: skip
    for step in epoch_of(plan, 1):
        assert 0 < step.num_tokens <= budget
        for world_size in (w for w in range(1, plan.lanes + 1) if plan.lanes % w == 0):
            for rank in range(world_size):
                (packs,) = of_rank([step], rank, world_size)
                assert sum(tokens[pack] for pack in packs) <= budget // world_size


@pytest.mark.parametrize(
    ("packs_per_step", "most", "lanes"), [(8, 64, 8), (64, 64, 64), (512, 64, 64), (72, 64, 36),
                                          (48, 64, 48), (7, 64, 7), (67, 64, 1), (64, 1, 1)]
)  # fmt: skip
def test_as_many_lanes_as_divide_a_step(
    make_source: MakeSource, packs_per_step: int, most: int, lanes: int
) -> None:
    plan = make_plan(make_source([40]), packs_per_step=packs_per_step, lanes=most)
    assert plan.lanes == lanes


def test_lanes_that_ranks_share(make_source: MakeSource) -> None:
    """More ranks than lanes, or a number that does not divide them: same steps, more reading."""
    for world_size in (3, 6, 12, 24):
        plan = make_plan(make_source([20] * 30), packs_per_step=24, lanes=8)
        assert plan.lanes == 8
        steps = epoch_of(plan, 0)
        ranks = [of_rank(steps, rank, world_size) for rank in range(world_size)]
        for step, parts in zip(steps, zip(*ranks, strict=True), strict=True):
            assert sum(parts, ()) == step.packs
        for rank, packs in enumerate(ranks):
            lanes = lanes_of_rank(8, rank=rank, world_size=world_size, by_tokens=False)
            for step, mine in enumerate(packs):
                ahead = plan.shards_ahead(step, lanes, steps=0)
                assert {pack.shard for pack in mine} <= set(ahead)


def test_a_lane_keeps_its_shards_where_there_are_many(make_source: MakeSource) -> None:
    """A node's disk then holds its share; few shards are dealt anew, to meet others."""
    for shards, kept in ((64, True), (20, False)):
        plan = make_plan(make_source([8] * shards), packs_per_step=4)
        of_first = [
            {pack.shard for packs in of_rank(epoch_of(plan, epoch), 0, 4) for pack in packs}
            for epoch in range(4)
        ]
        assert all(of_first[0] == other for other in of_first[1:]) == kept
        orders = {tuple(s.packs[0].shard for s in epoch_of(plan, epoch)) for epoch in range(4)}
        assert len(orders) == 4


def stream_loads(
    make_source: MakeSource, world_size: int, epochs: int = 1, **changes: Any
) -> tuple[int, int]:
    """Return how many shards all ranks read in some epochs, and the most one keeps at a time."""
    loads, most = 0, 0
    for rank in range(world_size):
        source = make_source([9] * 96)
        stream = TrainStream(
            source, DataSettings(**{"read_threads": 0, **changes}), seed=3, packs_per_step=32,
            rank=rank, world_size=world_size, accumulation=1, pack_length=16, temperature=1.0,
        )  # fmt: skip
        for _ in stream.steps(0, epochs * stream.steps_per_epoch):
            pass
        loads, most = loads + len(source.loads), max(most, source.most_held)
    return loads, most


@pytest.mark.parametrize("changes", [{}, {"packing": False}, {"batch_tokens": 1600}])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_stream_reads_each_shard_once_an_epoch(
    make_source: MakeSource, world_size: int, changes: dict[str, Any]
) -> None:
    """By a source that drops what it need not keep; a step cut across ranks read it by each."""
    loads, most = stream_loads(make_source, world_size, **changes)
    assert 96 <= loads <= 96 + world_size - 1 <= 1.1 * 96
    # A shard of each lane, two where a step is in both; and at most as many lanes' that come next.
    assert most <= 3 * 32 // world_size


def test_reading_ahead_reads_little_more(make_source: MakeSource) -> None:
    """A thread can come too late with a shard of a few steps; those of no epoch are not read."""
    assert 2 * 96 - 32 <= stream_loads(make_source, 1, epochs=2)[0] <= 2 * 96
    loads, _ = stream_loads(make_source, 1, epochs=2, read_threads=1)
    assert loads <= 1.1 * 2 * 96


def test_ranks_share_the_files_of_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader itself: how often each file is read, and how many shards it holds."""
    store, identity = Store(str(tmp_path)), sample_identity(corpus={"max_length": 40})
    records = []
    for split, index in [*(("train", index) for index in range(40)), ("heldout", 0)]:
        record, data = sample_shard(split, index, 6, identity=identity)
        commit_shard(store, record, data)
        records.append(record)
    finish(store, records, identity)
    reads: list[str] = []
    real = Store.read

    def noted(self: Store, name: str, **options: Any) -> bytes:
        if name.startswith("data/train"):
            reads.append(name)
        return real(self, name, **options)

    monkeypatch.setattr(Store, "read", noted)
    seen: list[str] = []
    for rank in range(4):
        source = open_cache(str(tmp_path)).source("train")
        stream = TrainStream(
            source, DataSettings(read_threads=0), seed=0, packs_per_step=16, rank=rank,
            world_size=4, accumulation=1, pack_length=40, temperature=1.0,
        )  # fmt: skip
        for step in stream.steps(0, stream.steps_per_epoch):
            seen += [name for batch in step.micro_batches for name in batch.sample_ids]
            assert len(source._tables) <= 3 * 16 // 4 + 4
    assert len(seen) == len(set(seen)) == 240
    assert set(reads) == {record.path for record in records if record.split == "train"}
    assert len(reads) <= 40 + 3


def test_a_plan_forms_no_pack_before_its_turn_and_holds_no_row(
    make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its start it counts; it formed all packs then, and held 29 bytes of every row."""
    formed: list[int] = []
    real = Window.form.__func__  # type: ignore[attr-defined]

    def noted(cls: type[Window], units: Any, pieces: Any, **options: Any) -> Window:
        formed.append(len(pieces))
        window: Window = real(cls, units, pieces, **options)
        return window

    monkeypatch.setattr(Window, "form", classmethod(noted))
    make_plan(make_source([30] * 3)).step(0)  # compiles
    rows, rng = 2_000, np.random.default_rng(0)
    sizes_R2 = np.stack([rng.integers(1, 512, rows, np.int32)] * 2, 1)

    class Many:
        def shard_rows(self) -> list[int]:
            return [rows] * 400

        def shard_sizes(self, _shard: int) -> Any:
            return sizes_R2

    formed.clear()
    tracemalloc.start()
    try:
        plan = make_plan(Many(), pack_length=512, packs_per_step=64)
        assert not formed
        assert plan.tokens_before(7 * plan.steps_per_epoch) == 7 * plan.totals.tokens
        assert not formed
        plan.step(5 * plan.steps_per_epoch + 3)
        assert len(formed) == 64
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    # Of 800,000 rows those of 64 shards are in packs, at 15 bytes a row.
    assert held < 64 * rows * 20


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lanes": 4}, "8 processes share 4 lanes of the data: each shard is read by up to 2"),
        ({"lanes": 4}, "raise data.lanes to 8 or more, in a new run"),
        ({"batch_tokens": 100}, "a larger data.batch_tokens has room for more lanes"),
        ({}, ""),
    ],
)
def test_more_processes_than_lanes_are_told_what_they_read(
    make_source: MakeSource, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], said: str
) -> None:
    for rank in (0, 1):
        TrainStream(
            make_source([20] * 8), DataSettings(**changes), seed=3, packs_per_step=16, rank=rank,
            world_size=8, accumulation=1, pack_length=16, temperature=1.0,
        )  # fmt: skip
    assert len(caplog.records) == bool(said)
    assert said in caplog.text
