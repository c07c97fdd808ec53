"""Steps by a budget of tokens: whole rows, never more than the budget, for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.data.order.plan import TrainPlan
from pipeline.data.order.step import Pack
from pipeline.data.settings import DataSettings
from pipeline.data.stream.train_stream import TrainStream
from pipeline.errors import ConfigError

MakeSource = Callable[..., Any]


def make_plan(source: Any, batch_tokens: int, **changes: Any) -> TrainPlan:
    options = {"seed": 0, "packs_per_step": 1, "pack_length": 2, "shuffle_shards": 2, "lanes": 64}
    return TrainPlan(source, **{**options, **changes}, batch_tokens=batch_tokens)


def epoch_of(plan: TrainPlan, epoch: int) -> list[Any]:
    return [plan.step(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]


@settings(max_examples=100, deadline=None)
@given(
    shard_rows=st.lists(st.integers(0, 12), min_size=1, max_size=7).filter(sum),
    longest=st.integers(1, 14),
    budget=st.integers(3, 200),
    shuffle_shards=st.integers(1, 8),
    seed=st.integers(-5, 2**70),
)
def test_each_row_once_and_no_step_above_the_budget(
    make_source: MakeSource,
    shard_rows: list[int],
    longest: int,
    budget: int,
    shuffle_shards: int,
    seed: int,
) -> None:
    """In every epoch as many steps, none without a row."""
    source = make_source(shard_rows, longest=longest)
    assume(budget >= 3 * source.lengths().max())
    plan = make_plan(source, budget, seed=seed, shuffle_shards=shuffle_shards)
    every = {Pack(s, (r,)) for s, rows in enumerate(shard_rows) for r in range(rows)}
    for epoch in (0, 1, 6):
        steps = epoch_of(plan, epoch)
        packs = [pack for step in steps for pack in step.packs]
        assert len(packs) == len(every)
        assert set(packs) == every
        assert {step.epoch for step in steps} == {epoch}
        assert all(0 < step.num_tokens <= budget for step in steps)
        assert sum(step.num_tokens for step in steps) == source.lengths().sum()
        assert sum(step.num_loss_tokens for step in steps) == source.loss_token_counts().sum()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    spare=st.integers(0, 300),
    world_size=st.integers(1, 6),
    accumulation=st.integers(1, 4),
)
def test_micro_batches_are_the_step_and_bounded(
    make_source: MakeSource, lengths: list[int], spare: int, world_size: int, accumulation: int
) -> None:
    """In order, for any number of ranks; in one lane, each is at most its share and a row more."""
    source = make_source([len(lengths)])
    source.set_lengths(lengths)
    plan = make_plan(source, 3 * max(lengths) + spare, lanes=1)
    for step in epoch_of(plan, 0):
        parts = [
            part
            for rank in range(world_size)
            for part in step.micro_batches(
                rank=rank, world_size=world_size, accumulation=accumulation
            )
        ]
        assert len(parts) == world_size * accumulation
        assert tuple(pack for part in parts for pack in part) == step.packs
        share = -(-step.num_tokens // len(parts))
        for part in parts:
            assert sum(lengths[pack.rows[0]] for pack in part) <= share + max(lengths) - 1


def test_a_step_is_found_without_the_ones_before(make_source: MakeSource) -> None:
    source = make_source([20] * 6)
    plan = make_plan(source, 40)
    forward = [plan.step(i) for i in range(3 * plan.steps_per_epoch)]
    for i in (0, 7, len(forward) - 1, plan.steps_per_epoch):
        assert make_plan(source, 40).step(i) == forward[i]
    assert forward[0].packs != forward[plan.steps_per_epoch].packs


def test_neighbours_change_and_lengths_do_not_follow_position(make_source: MakeSource) -> None:
    """Rows are shuffled one by one, not in fixed company."""
    source = make_source([400, 400], longest=16)
    plan = make_plan(source, 100)
    company = [
        {pack.rows[0] for pack in step.packs if pack.shard == 0}
        for epoch in (0, 1)
        for step in epoch_of(plan, epoch)
        if Pack(0, (3,)) in step.packs
    ]
    assert company[0] != company[1]
    starts = [0, 400]
    lengths = [
        source.lengths()[starts[pack.shard] + pack.rows[0]]
        for step in epoch_of(plan, 0)
        for pack in step.packs
    ]
    assert abs(np.corrcoef(np.arange(len(lengths)), lengths)[0, 1]) < 0.12
    # The budget is used but for the longest row, which may not fit.
    assert plan.fill > 0.84


def test_the_stream_takes_any_number_of_ranks(make_source: MakeSource) -> None:
    """Three ranks share the same steps as one; the collated batches say so."""
    source = make_source([20, 31, 7])

    def samples(rank: int, world_size: int) -> list[list[str]]:
        stream = TrainStream(
            source, DataSettings(batch_tokens=60), seed=1, packs_per_step=1, rank=rank,
            world_size=world_size, accumulation=2, pack_length=4, temperature=1.0,
        )  # fmt: skip
        with stream.iterate(0, stream.steps_per_epoch) as steps:
            return [[s for b in step.micro_batches for s in b.sample_ids] for step in steps]

    alone, ranks = samples(0, 1), [samples(rank, 3) for rank in range(3)]
    assert alone == [[s for part in parts for s in part] for parts in zip(*ranks, strict=True)]


def test_refusals(make_source: MakeSource) -> None:
    source = make_source([40])
    longest = int(source.lengths().max())
    with pytest.raises(ConfigError, match=rf"three times as much, {3 * longest}; raise it"):
        make_plan(source, 3 * longest - 1)
    with pytest.raises(ValueError, match="found 600 and 64, expected at most one"):
        DataSettings(batch_tokens=600, pack_length=64)


def test_rows_without_tokens_are_kept(make_source: MakeSource) -> None:
    source = make_source([6])
    source.set_lengths([0, 3, 0, 0, 5, 0])
    rows = [p.rows[0] for step in epoch_of(make_plan(source, 15), 0) for p in step.packs]
    assert sorted(rows) == list(range(6))


def test_what_makes_a_run_another_run() -> None:
    """All that decides the losses, also what is unset; how data come may change on the way."""
    before = {
        "pack_length": None, "packing": True, "batch_tokens": None, "lanes": 64,
        "shuffle_shards": 8, "max_entries": None, "tau_factor": None,
    }  # fmt: skip
    assert DataSettings().identity() == before
    other = DataSettings(
        prefetch_batches=9, read_threads=0, disk_cache="/tmp/x", disk_cache_gib=1,
        on_damaged_shard="skip", stall_warning_s=1, stall_timeout_s=2,
    )  # fmt: skip
    assert other.identity() == before
    assert DataSettings(batch_tokens=600).identity() == {**before, "batch_tokens": 600}
