"""The order of a mixture: exact shares, the same steps for any ranks, found by their number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.mixture.rows import MixedPart, MixedRows
from pipeline.data.mixture.shares import make_shares
from pipeline.data.order.mixed_plan import MixedPlan
from pipeline.data.settings import DataSettings
from pipeline.data.stream.train_stream import TrainStream
from pipeline.errors import CacheError, ConfigError

MakeSource = Callable[..., Any]
WEIGHTS = st.lists(st.integers(1, 60).map(lambda n: n / 10), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_after_any_number_of_packs_each_cache_has_had_its_share(weights: list[float]) -> None:
    shares = make_shares(weights)
    exact = np.array(weights) / sum(weights)
    before: tuple[int, ...] = (0,) * len(weights)
    for n in [*range(200), 10**12 + 7]:
        had = shares.before(n)
        assert sum(had) == n
        assert np.abs(np.array(had) - n * exact).max() < 1 + 1e-3
        if n < 200:
            assert all(b - a in (0, 1) for a, b in zip(before, had, strict=True))
            before = had


def test_weights_without_a_short_period_are_rounded_to_a_ten_thousandth() -> None:
    shares = make_shares([0.123456789, 1e-9, 1.0])
    parts = np.array(shares.counts_C) / shares.period
    assert shares.period == 10_000
    assert np.abs(parts - np.array([0.123456789, 1e-9, 1.0]) / 1.12345679).max() <= 1e-4
    assert min(shares.counts_C) >= 1


def mixed(make_source: MakeSource, shard_rows: list[list[int]], weights: list[float]) -> MixedRows:
    return MixedRows(
        tuple(
            MixedPart(f"c{i}", weight, make_source(rows, seed=i))
            for i, (rows, weight) in enumerate(zip(shard_rows, weights, strict=True))
        )
    )


def plan_of(mixture: MixedRows, **changes: Any) -> MixedPlan:
    options = {
        "seed": 0, "packs_per_step": 12, "pack_length": 16, "shuffle_shards": 4, "lanes": 8,
    }  # fmt: skip
    return MixedPlan(mixture, mixture, **{**options, **changes})


SPLITS = st.lists(
    st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(sum), min_size=2, max_size=3
)


@settings(max_examples=20, deadline=None)
@given(SPLITS, st.integers(1, 9), st.booleans(), st.sampled_from([None, 400]), st.integers(0, 99))
def test_every_pack_of_a_cache_comes_once_in_each_of_its_epochs(
    make_source: MakeSource,
    shard_rows: list[list[int]],
    weight: int,
    packing: bool,
    batch_tokens: int | None,
    seed: int,
) -> None:
    weights = [1.0, weight / 2, 0.7][: len(shard_rows)]
    mixture = mixed(make_source, shard_rows, weights)
    changes: Any = {"packing": packing, "batch_tokens": batch_tokens, "seed": seed}
    plan = plan_of(mixture, **changes)
    steps = [plan.step(i) for i in range(9)]
    again = plan_of(mixture, **changes)  # a run that starts in the middle
    for number in (7, 2):
        assert again.step(number) == steps[number]
        assert plan.tokens_before(number) == sum(s.num_tokens for s in steps[:number])
    sizes = [len(source.source.lengths()) for source in mixture.parts]
    seen: Counter[tuple[int, int]] = Counter()
    for step in steps:
        assert batch_tokens or len(step.packs) == 12
        assert not batch_tokens or step.num_tokens <= batch_tokens
        for pack in step.packs:
            cache, _ = mixture.place(pack.shard)
            seen.update((pack.shard, row) for row in pack.rows)
    for cache, rows in enumerate(sizes):
        times = [n for (shard, _), n in seen.items() if mixture.place(shard)[0] == cache]
        epochs = plan.epochs(9)[cache]
        assert max(times, default=0) <= -(-epochs // 1) + 1e-9 + (epochs == int(epochs))
        if epochs >= 1:  # each row as often as whole epochs, at least
            assert len(times) == rows
            assert min(times) >= int(epochs)


def test_ranks_share_the_same_steps_and_read_their_part(make_source: MakeSource) -> None:
    mixture = mixed(make_source, [[20] * 24, [20] * 12], [3.0, 1.0])
    plan = plan_of(mixture, packs_per_step=16, lanes=16)
    for number in (0, 3, 11):
        step = plan.step(number)
        for world in (1, 2, 4, 8):
            parts = [
                step.micro_batches(rank=r, world_size=world, accumulation=2) for r in range(world)
            ]
            assert tuple(p for rank in parts for micro in rank for p in micro) == step.packs
            assert {len(micro) for rank in parts for micro in rank} == {16 // world // 2}
    read: dict[int, set[int]] = {rank: set() for rank in range(4)}
    for number in range(plan.steps_per_epoch):
        for rank in range(4):
            micro = plan.step(number).micro_batches(rank=rank, world_size=4, accumulation=1)
            read[rank] |= {pack.shard for packs in micro for pack in packs}

    assert sum(map(len, read.values())) < 2 * 36  # each would read all 36 were there no lanes


def test_a_skipped_shard_leaves_the_others_as_they_are(make_source: MakeSource) -> None:
    mixture = mixed(make_source, [[9, 9, 9], [9, 9]], [1.0, 2.0])
    whole, skipping = plan_of(mixture), plan_of(mixture)
    skipping.skip_shard(3, 2)  # the first of the second cache
    for number in range(6):
        a, b = whole.step(number), skipping.step(number)
        kept = [pack for pack in a.packs if number < 2 or pack.shard != 3]
        assert list(b.packs) == kept
        rows = sum(len(p.rows) for p in a.packs) - sum(len(p.rows) for p in b.packs)
        assert b.num_skipped_rows == rows
    lost = sum(whole.step(i).num_tokens - skipping.step(i).num_tokens for i in range(6))
    assert skipping.skipped_before(6)[1] == lost > 0
    assert skipping.tokens_before(6) == sum(skipping.step(i).num_tokens for i in range(6))


def test_a_stream_of_a_mixture_reads_each_row_of_its_cache(make_source: MakeSource) -> None:
    mixture = mixed(make_source, [[12, 12], [12]], [1.0, 1.0])
    stream = TrainStream(
        mixture, DataSettings(lanes=4), seed=1, packs_per_step=4, rank=0, world_size=1,
        accumulation=2, pack_length=16, temperature=1.0,
    )  # fmt: skip
    with stream.iterate(0, 5) as steps:
        batches = [batch for step in steps for batch in step.micro_batches]
    resumed = TrainStream(
        mixture, DataSettings(lanes=4), seed=1, packs_per_step=4, rank=0, world_size=1,
        accumulation=2, pack_length=16, temperature=1.0,
    )  # fmt: skip
    with resumed.iterate(3, 5) as steps:
        later = [batch for step in steps for batch in step.micro_batches]
    assert [b.sample_ids for b in batches[6:]] == [b.sample_ids for b in later]
    assert {name.partition(":")[0] for b in batches for name in b.sample_ids} == {"c0", "c1"}


def test_a_cache_without_rows_or_with_too_small_a_part_is_told(make_source: MakeSource) -> None:
    with pytest.raises(CacheError, match="c1: the cache has no training rows"):
        plan_of(mixed(make_source, [[5], [0]], [1.0, 1.0]))
    with pytest.raises(ConfigError, match=r"of which c1 has 4, but it has a row"):
        plan_of(mixed(make_source, [[50], [50]], [99.0, 1.0]), batch_tokens=400)
