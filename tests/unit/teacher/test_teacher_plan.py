"""The cut into shards, and agreement on whose folder it is."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.layout.names import MANIFEST, PLAN
from pipeline.config import fingerprint
from pipeline.corpus.sample import Sample
from pipeline.corpus.table import SampleTable
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.teacher.capture.complete import finished_cache
from pipeline.teacher.capture.plan import settle_plan
from pipeline.teacher.capture.source import cut_table
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
    planned = cut_table(samples, shard_tokens=shard_tokens)
    for split in ("train", "heldout"):
        shards = [shard for shard in planned if shard.split == split]
        wanted = [sample.sample_id for sample in samples if sample.split == split]
        assert [s.sample_id for shard in shards for s in shard.samples] == wanted
        assert [shard.index for shard in shards] == list(range(len(shards)))
        assert all(len(shard.samples) for shard in shards)
        if not wanted:
            assert not shards
            continue
        sizes = [shard.num_tokens for shard in shards]
        longest = max(n for n, s in zip(lengths, samples, strict=True) if s.split == split)
        count = min(len(wanted), max(1, round(sum(sizes) / shard_tokens)))
        assert len(shards) == count
        if longest <= sum(sizes) / count:
            assert all(abs(size - sum(sizes) / count) <= longest for size in sizes)
    splits = [shard.split for shard in planned]
    assert splits == sorted(splits, reverse=True)  # train before held-out, as in the manifest


def test_the_same_identity_again_is_agreed_on(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    settle_plan(store, sample_identity())
    before = store.read(PLAN)
    settle_plan(Store(str(tmp_path)), sample_identity())
    assert store.read(PLAN) == before
    data = json.loads(before)
    assert data["identity"] == sample_identity()
    assert data["identity_digest"] == fingerprint(sample_identity())
    assert len(before) < 4000, "whatever the corpus"


def test_another_identity_is_refused_with_the_fields(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    settle_plan(store, sample_identity())
    before = store.read(PLAN)
    other = sample_identity(shard_tokens=64, corpus={"source": "elsewhere"})
    with pytest.raises(CacheError) as caught:
        settle_plan(store, other)
    said = str(caught.value)
    assert "corpus.source: random there, elsewhere asked for" in said
    assert "shard_tokens: 32 there, 64 asked for" in said
    assert "teacher" not in said
    assert "choose another --cache_dir" in said
    assert store.read(PLAN) == before


def test_of_concurrent_runs_of_two_identities_one_wins(tmp_path: Path) -> None:
    def settle(number: int) -> bool:
        try:
            settle_plan(Store(str(tmp_path)), sample_identity(shard_tokens=number % 2))
        except CacheError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        agreed = list(pool.map(settle, range(8)))
    winner = json.loads((tmp_path / PLAN).read_bytes())["identity"]["shard_tokens"]
    assert agreed == [number % 2 == winner for number in range(8)]


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"identity": {"a": 1}}'])
def test_a_damaged_plan_is_named(damage: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    settle_plan(store, sample_identity())
    store.write(PLAN, damage.encode())
    with pytest.raises(CacheError, match=r"plan.json: damaged; delete it"):
        settle_plan(store, sample_identity())
    store.delete(PLAN)
    settle_plan(store, sample_identity())
    store.write(PLAN, store.read(PLAN).replace(b'"random"', b'"rando}"'))
    with pytest.raises(CacheError, match="damaged"):
        settle_plan(store, sample_identity())
    store.delete(PLAN)
    settle_plan(store, sample_identity())


def test_a_finished_cache_without_its_plan_is_still_someones(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "cache"))
    write_cache(store.url)
    for _ in range(2):
        with pytest.raises(CacheError, match="shard_tokens: 32 there, 64 asked for"):
            finished_cache(store, sample_identity(shard_tokens=64))
        assert not store.exists(PLAN)
    manifest = finished_cache(store, sample_identity())
    assert manifest is not None
    assert manifest.identity == sample_identity()


def test_what_is_begun_or_damaged_is_not_finished(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "cache"))
    assert finished_cache(store, sample_identity()) is None
    settle_plan(store, sample_identity())
    assert finished_cache(store, sample_identity()) is None
    with pytest.raises(CacheError, match="another identity"):
        finished_cache(store, sample_identity(shard_tokens=64))
    write_cache(store.url)
    store.write(MANIFEST, store.read(MANIFEST).replace(b'"random"', b'"rando}"'))
    assert finished_cache(store, sample_identity()) is None, "it is written again"
