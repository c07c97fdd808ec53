"""The cut into shards, and agreement on whose folder it is."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.layout.names import PLAN
from pipeline.config import fingerprint
from pipeline.corpus import table
from pipeline.corpus.sample import Sample
from pipeline.corpus.table import SampleTable
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.teacher.capture.plan import cut_shards, settle_plan
from tests.unit.cache.sample_cache import sample_identity, write_cache


def _samples(lengths: list[int], heldout_every: int = 4) -> SampleTable:
    samples = [
        Sample(
            sample_id=f"{i:032x}",
            split="heldout" if i % heldout_every == heldout_every - 1 else "train",
            input_ids=np.zeros(length, np.int32),
            loss_mask=np.zeros(length, np.bool_),
            source_index=i,
            part=0,
        )
        for i, length in enumerate(lengths)
    ]
    return SampleTable.of(samples)


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=120),
    shard_tokens=st.integers(1, 3000),
    heldout_every=st.integers(1, 9),
)
@settings(max_examples=300, deadline=None)
def test_every_sample_once_in_order_in_shards_of_about_equal_size(
    lengths: list[int], shard_tokens: int, heldout_every: int
) -> None:
    samples = _samples(lengths, heldout_every)
    plan = cut_shards(samples, shard_tokens=shard_tokens)
    for split in ("train", "heldout"):
        shards = [shard for shard in plan.shards if shard.split == split]
        wanted = [sample.sample_id for sample in samples if sample.split == split]
        assert [s.sample_id for shard in shards for s in shard.samples] == wanted
        assert [shard.index for shard in shards] == list(range(len(shards)))
        assert all(shard.samples for shard in shards)
        if not wanted:
            assert not shards
            continue
        sizes = [shard.num_tokens for shard in shards]
        longest = max(n for n, s in zip(lengths, samples, strict=True) if s.split == split)
        count = max(1, round(sum(sizes) / shard_tokens))
        assert len(shards) <= count
        if longest <= sum(sizes) / count:
            assert len(shards) == count
            assert all(abs(size - sum(sizes) / count) <= longest for size in sizes)
    splits = [shard.split for shard in plan.shards]
    assert splits == sorted(splits, reverse=True)  # train before held-out, as in rows.bin
    assert cut_shards(samples, shard_tokens=shard_tokens) == plan


@given(
    lengths=st.lists(st.integers(1, 5000), max_size=150),
    shard_tokens=st.integers(1, 20_000),
    block=st.integers(1, 200),
)
@settings(max_examples=200, deadline=None)
def test_the_cut_is_that_of_the_plain_rule(
    lengths: list[int], shard_tokens: int, block: int
) -> None:
    """Written sample by sample, with Python's numbers: caches that exist were cut like that."""
    total = sum(lengths)
    count = max(1, round(total / shard_tokens))
    groups: list[list[str]] = [[] for _ in range(count)]
    seen = 0
    for number, length in enumerate(lengths):
        middle = seen + length / 2
        groups[min(count - 1, int(middle * count / total))].append(f"{number:032x}")
        seen += length
    wanted = [group for group in groups if group]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "_BLOCK", block)
        plan = cut_shards(_samples(lengths, len(lengths) + 1), shard_tokens=shard_tokens)
        assert [list(shard.samples.sample_ids()) for shard in plan.shards] == wanted
        shards = json.loads(plan.to_bytes({}))["shards"]
        assert [shard["samples_sha256"] for shard in shards] == [fingerprint(ids) for ids in wanted]


def _plan(*lengths: int, shard_tokens: int = 20):  # type: ignore[no-untyped-def]
    return cut_shards(_samples(list(lengths)), shard_tokens=shard_tokens)


def test_plan_file_says_what_is_planned() -> None:
    data = json.loads(_plan(10, 10, 10, 5, 10).to_bytes(sample_identity()))
    assert data["identity"] == sample_identity()
    sizes = [(s["split"], s["index"], s["rows"], s["tokens"]) for s in data["shards"]]
    assert sizes == [("train", 0, 2, 20), ("train", 1, 2, 20), ("heldout", 0, 1, 5)]


def test_the_same_plan_again_is_agreed_on(tmp_path: Path) -> None:
    store, plan = Store(str(tmp_path)), _plan(10, 10, 10, 5)
    settle_plan(store, plan, sample_identity())
    before = store.read(PLAN)
    settle_plan(Store(str(tmp_path)), plan, sample_identity())
    assert store.read(PLAN) == before == plan.to_bytes(sample_identity())


def test_another_identity_is_refused_with_the_fields(tmp_path: Path) -> None:
    store, plan = Store(str(tmp_path)), _plan(10, 10, 10, 5)
    settle_plan(store, plan, sample_identity())
    before = store.read(PLAN)
    other = sample_identity(shard_tokens=64, corpus={"source": "elsewhere"})
    with pytest.raises(CacheError) as caught:
        settle_plan(store, plan, other)
    said = str(caught.value)
    assert "corpus.source: random there, elsewhere asked for" in said
    assert "shard_tokens: 32 there, 64 asked for" in said
    assert "teacher" not in said
    assert "choose another --cache_dir" in said
    with pytest.raises(CacheError, match="another cut"):
        settle_plan(store, _plan(10, 10, 10, 5, shard_tokens=9), sample_identity())
    assert store.read(PLAN) == before


def test_of_concurrent_runs_of_two_identities_one_wins(tmp_path: Path) -> None:
    plan = _plan(10, 10, 10, 5)

    def settle(number: int) -> bool:
        try:
            settle_plan(Store(str(tmp_path)), plan, sample_identity(shard_tokens=number % 2))
        except CacheError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        agreed = list(pool.map(settle, range(8)))
    winner = json.loads((tmp_path / PLAN).read_bytes())["identity"]["shard_tokens"]
    assert agreed == [number % 2 == winner for number in range(8)]


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"identity": {"a": 1}}'])
def test_a_damaged_plan_is_named(damage: str, tmp_path: Path) -> None:
    store, plan = Store(str(tmp_path)), _plan(10, 10, 10, 5)
    settle_plan(store, plan, sample_identity())
    store.write(PLAN, damage.encode())
    with pytest.raises(CacheError, match=r"plan.json: damaged; delete it"):
        settle_plan(store, plan, sample_identity())
    text = plan.to_bytes(sample_identity()).replace(b'"random"', b'"rando}"')
    store.write(PLAN, text)
    with pytest.raises(CacheError, match="damaged"):
        settle_plan(store, plan, sample_identity())
    store.delete(PLAN)
    settle_plan(store, plan, sample_identity())


def test_a_finished_cache_without_its_plan_is_still_someones(tmp_path: Path) -> None:
    store, plan = Store(str(tmp_path / "cache")), _plan(10, 10, 10, 5)
    write_cache(store.url)
    for _ in range(2):  # and refusing leaves nothing that would be agreed with next time
        with pytest.raises(CacheError, match="shard_tokens: 32 there, 64 asked for"):
            settle_plan(store, plan, sample_identity(shard_tokens=64))
        assert not store.exists(PLAN)
    settle_plan(store, plan, sample_identity())
    assert store.read(PLAN) == plan.to_bytes(sample_identity())
