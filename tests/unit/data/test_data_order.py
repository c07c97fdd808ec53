"""Order, packing and plan: pure arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order.packing import count_packs, shard_units
from pipeline.data.order.permutation import derive_key, permutation
from pipeline.data.order.plan import TrainPlan
from pipeline.errors import CacheError, ConfigError


def make_plan(source: Any, **changes: Any) -> TrainPlan:
    """Return a plan with small numbers."""
    options = {
        "seed": 0, "packs_per_step": 4, "pack_length": 16, "shuffle_shards": 2, "lanes": 64,
    }  # fmt: skip
    return TrainPlan(source, **{**options, **changes})


def test_golden_order() -> None:
    """Frozen: another order is another run, and old checkpoints would resume wrongly."""
    assert derive_key(42, 0, 1) == GOLDEN_KEY
    assert permutation(10, derive_key(42, 0, 1)).tolist() == GOLDEN_PERMUTATION


def test_golden_steps(make_source: Callable[..., Any]) -> None:
    """Frozen: the whole chain from seed and lengths to the rows of a step."""
    source = make_source([4, 3, 5])
    source.set_lengths([3, 9, 5, 5, 16, 2, 7, 8, 8, 4, 1, 6])
    plan = make_plan(source, packs_per_step=2)
    steps = [
        [(pack.shard, pack.rows) for pack in plan.step(i).packs]
        for i in range(plan.steps_per_epoch)
    ]
    assert steps == GOLDEN_STEPS


@given(st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_permutation_is_one(count: int, key: int) -> None:
    """Every index once, the same every time."""
    order = permutation(count, key)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, permutation(count, key))


def test_permutations_look_uniform() -> None:
    """Each of the 24 orders of 4 comes up about equally often over seeds."""
    seen = Counter(tuple(permutation(4, derive_key(seed, 0, 1)).tolist()) for seed in range(4800))
    assert len(seen) == 24
    chi_squared = sum((count - 200) ** 2 / 200 for count in seen.values())
    assert chi_squared < 49.7  # 23 degrees of freedom, p = 0.001


def test_keys_depend_on_every_part() -> None:
    """Also on order, sign and size."""
    keys = {
        derive_key(*parts)
        for parts in [(1, 2), (2, 1), (1, 2, 0), (-1, 2), (1, 2 + 2**40), (0,), (0, 0), ()]
    }
    assert len(keys) == 8


@settings(deadline=None)  # the first example may wait for numba's compiler
@given(
    st.lists(st.integers(1, 40), max_size=80),
    st.integers(40, 64),
    st.booleans(),
    st.integers(0, 2**64 - 1),
)
def test_packs_hold_each_row_once_and_fit(
    lengths: list[int], pack_length: int, packing: bool, key: int
) -> None:
    """Whatever the lengths; and the number of packs does not depend on the key."""
    lengths_R = np.array(lengths, np.int32)
    units = shard_units(lengths_R, pack_length, key, packing=packing)
    packs = np.split(units.rows_R, units.bounds[1:-1]) if lengths else []
    assert len(units.bounds) - 1 == len(packs)
    if packing:
        assert len(packs) == count_packs(lengths_R, pack_length)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert all(lengths_R[pack].sum() <= pack_length for pack in packs)
    assert all(len(pack) for pack in packs)
    if not packing:
        assert len(packs) == len(lengths)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 50))
def test_packing_is_first_fit_decreasing(lengths: list[int], pack_length: int) -> None:
    """The histogram version gives the textbook's bins."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        for one in bins:
            if sum(one) + length <= pack_length:
                one.append(length)
                break
        else:
            bins.append([length])
    lengths_R = np.array(lengths, np.int32)
    rows_R, bounds = shard_units(lengths_R, pack_length, 0, packing=True)
    assert [lengths_R[rows_R[a:b]].tolist() for a, b in pairwise(bounds)] == bins
    assert count_packs(lengths_R, pack_length) == len(bins)


def test_equal_lengths_swap_places_between_epochs() -> None:
    """Companions in a pack change where lengths allow."""
    first, second = (
        shard_units(np.full(40, 5, np.int32), 10, key, packing=True).rows_R.reshape(20, 2)
        for key in (1, 2)
    )
    assert {tuple(sorted(p)) for p in first} != {tuple(sorted(p)) for p in second}


def test_fill_of_realistic_lengths() -> None:
    """Two thousand chat-like lengths waste less than one per cent."""
    rng = np.random.default_rng(0)
    lengths_R = np.clip(rng.lognormal(6, 0.8, 2000), 8, 2048).astype(np.int32)
    assert lengths_R.sum() / (count_packs(lengths_R, 2048) * 2048) > 0.99


@settings(max_examples=60, deadline=None)
@given(
    shard_rows=st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(sum),
    shuffle_shards=st.integers(1, 8),
    packs_per_step=st.integers(1, 24),
    packing=st.booleans(),
    lanes=st.sampled_from([1, 2, 6, 64]),
    seed=st.integers(-5, 2**70),
)
def test_each_row_once_per_epoch(
    make_source: Callable[..., Any],
    shard_rows: list[int],
    shuffle_shards: int,
    packs_per_step: int,
    packing: bool,
    lanes: int,
    seed: int,
) -> None:
    """For any shards, lanes, windows, step sizes and seeds; counts add up."""
    source = make_source(shard_rows)
    plan = make_plan(
        source,
        seed=seed,
        shuffle_shards=shuffle_shards,
        packs_per_step=packs_per_step,
        packing=packing,
        lanes=lanes,
    )
    every = {(s, r) for s, rows in enumerate(shard_rows) for r in range(rows)}
    for epoch in (0, 1, 5):
        steps = [plan.step(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]
        rows = [(p.shard, row) for step in steps for p in step.packs for row in p.rows]
        assert len(rows) == len(every)
        assert set(rows) == every
        assert {step.epoch for step in steps} == {epoch}
        assert all(len(step.packs) == packs_per_step for step in steps[:-1])
        assert sum(step.num_tokens for step in steps) == source.lengths().sum()
        assert sum(step.num_loss_tokens for step in steps) == source.loss_token_counts().sum()
        assert plan.tokens_before((epoch + 1) * len(steps)) == (epoch + 1) * plan.totals.tokens


def test_epochs_and_seeds_differ_and_access_is_random(make_source: Callable[..., Any]) -> None:
    """Step i is the same however it is reached."""
    source = make_source([20] * 6)
    plan = make_plan(source)
    forward = [plan.step(i) for i in range(2 * plan.steps_per_epoch)]
    backward = [make_plan(source).step(i) for i in reversed(range(2 * plan.steps_per_epoch))]
    assert forward == backward[::-1]
    assert forward[0].packs != forward[plan.steps_per_epoch].packs
    assert forward[0].packs != make_plan(source, seed=1).step(0).packs


def test_lengths_do_not_follow_position(make_source: Callable[..., Any]) -> None:
    """First-fit decreasing starts with the longest; the shuffle must hide that."""
    source = make_source([400, 400], longest=16)
    plan = make_plan(source, packing=False)
    starts = [0, 400]
    lengths = np.array(
        [
            source.lengths()[starts[pack.shard] + pack.rows[0]]
            for i in range(plan.steps_per_epoch)
            for pack in plan.step(i).packs
        ]
    )
    assert abs(np.corrcoef(np.arange(len(lengths)), lengths)[0, 1]) < 0.12


@given(st.integers(0, 20), st.sampled_from([(1, 1), (1, 4), (2, 2), (4, 1), (2, 1)]))
def test_micro_batches_cover_the_step(packs: int, split: tuple[int, int]) -> None:
    """Contiguous, in order, as even as can be, for short steps too."""
    from pipeline.data.order.step import Pack, StepPlan

    world_size, accumulation = split
    step = StepPlan(0, 0, tuple(Pack(0, (i,)) for i in range(packs)), 0, 0)
    parts = [
        part
        for rank in range(world_size)
        for part in step.micro_batches(rank=rank, world_size=world_size, accumulation=accumulation)
    ]
    assert len(parts) == world_size * accumulation
    assert tuple(pack for part in parts for pack in part) == step.packs
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_refusals(make_source: Callable[..., Any]) -> None:
    """No rows; a pack too short for a row."""
    with pytest.raises(CacheError, match="no training rows"):
        make_plan(make_source([0, 0]))
    with pytest.raises(ConfigError, match="pack_length is 5"):
        make_plan(make_source([30]), pack_length=5)


GOLDEN_KEY = 0xB682EE25CE24109E
GOLDEN_PERMUTATION = [2, 4, 8, 5, 0, 7, 6, 3, 1, 9]
GOLDEN_STEPS = [[(2, (4, 2, 3)), (2, (1, 0))], [(0, (1, 3)), (1, (2, 1))], [(0, (2, 0)), (1, (0,))]]
