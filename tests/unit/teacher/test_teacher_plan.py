"""The cut into shards, and agreement on whose folder it is."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.layout.names import MANIFEST, PLAN
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.teacher.capture.complete import finished_cache
from pipeline.teacher.capture.groups import cut_lengths
from pipeline.teacher.capture.plan import settle_plan
from tests.unit.cache.sample_cache import sample_identity, write_cache


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=120),
    shard_tokens=st.integers(1, 3000),
)
@settings(max_examples=300, deadline=None)
def test_every_sample_once_in_order_in_shards_of_about_equal_size(
    lengths: list[int], shard_tokens: int
) -> None:
    count = min(len(lengths), max(1, round(sum(lengths) / shard_tokens)))
    starts = cut_lengths(lengths, count)
    assert starts[0] == 0
    assert starts[-1] == len(lengths)
    assert len(starts) == count + 1
    assert all(start < stop for start, stop in itertools.pairwise(starts)), "none is empty"
    sizes = [sum(lengths[start:stop]) for start, stop in itertools.pairwise(starts)]
    mean = sum(lengths) / count
    if max(lengths) <= mean:
        assert all(abs(size - mean) <= max(lengths) for size in sizes)


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
