"""A top-k cache whose held-out rows have a sampled tail: read, sliced, exported, verified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.io.reader import Cache, open_cache
from pipeline.cache.tools.export import export_plain
from pipeline.cache.tools.slice import SliceSpec, slice_cache
from pipeline.cache.tools.verify import verify_cache
from pipeline.errors import CacheError
from pipeline.storage import Store
from tests.unit.cache.sample_cache import read_all

GOLDEN = Path(__file__).parents[2] / "golden" / "cache-v1-top-k-heldout"


@pytest.fixture
def cache() -> Cache:
    return open_cache(str(GOLDEN))


def test_each_split_has_its_codec(cache: Cache) -> None:
    assert CodecSpec.from_json(cache.spec.to_json()) == cache.spec
    assert cache.rule is None
    assert cache.heldout_rule is not None
    assert cache.spec.of_split("train").heldout is None
    (row,) = cache.rows("heldout")
    assert row.targets.inclusion_E is not None
    assert all(row.targets.inclusion_E is None for row in cache.rows("train"))
    assert not verify_cache(Store(str(GOLDEN)))


def test_the_largest_of_held_out_rows_are_a_top_k(cache: Cache) -> None:
    (whole,), (few,) = cache.rows("heldout"), cache.rows("heldout", top_k=2)
    assert few.targets.inclusion_E is None
    assert few.targets.sampled_step == 0
    assert few.targets.counts_N.tolist() == [2] * whole.targets.num_positions
    for position in range(whole.targets.num_positions):
        ids, logprobs = few.targets.entries(position)
        every, values = whole.targets.entries(position)
        start = int(whole.targets.counts_N[:position].sum())
        assert whole.targets.inclusion_E is not None
        kept = whole.targets.inclusion_E[start : start + len(every)] == 1
        assert sorted(logprobs) == pytest.approx(sorted(values[kept])[-2:])
        assert (np.diff(ids) > 0).all()
        assert whole.targets.largest_N is not None
        assert whole.targets.largest_N[position] in ids


def test_a_slice_of_fewer_entries_is_measured_as_before(cache: Cache, tmp_path: Path) -> None:
    target = Store(str(tmp_path / "sliced"))
    slice_cache(cache, target, SliceSpec(top_k=1), command="slice")
    sliced = open_cache(target.url)
    for row in sliced.rows("train"):
        assert row.targets.requested_E is not None  # what was asked for by id stays
        assert (~row.targets.requested_E).sum() <= row.targets.num_positions
    (before,), (after,) = cache.rows("heldout"), sliced.rows("heldout")
    assert before.targets.token_ids_E.tolist() == after.targets.token_ids_E.tolist()
    assert sliced.heldout_rule == cache.heldout_rule
    assert not verify_cache(target)


def test_held_out_rows_that_are_trained_on_are_sampled_targets(
    cache: Cache, tmp_path: Path
) -> None:
    target = Store(str(tmp_path / "sliced"))
    with pytest.raises(CacheError, match="biased"):
        slice_cache(cache, target, SliceSpec(split="heldout", top_k=1), command="slice")
    slice_cache(cache, target, SliceSpec(split="heldout"), command="slice")
    sliced = open_cache(target.url)
    assert sliced.rule == cache.heldout_rule
    (before,), (after,) = cache.rows("heldout"), sliced.rows("train")
    assert before.targets.token_ids_E.tolist() == after.targets.token_ids_E.tolist()
    assert len(read_all(sliced)) == 1


def test_an_export_has_equal_columns_in_both_splits(cache: Cache, tmp_path: Path) -> None:
    export_plain(cache, Store(str(tmp_path)), command="export", top_k=3)
    schemas = [
        pq.read_schema(tmp_path / f"data/{split}/00000.parquet") for split in ("train", "heldout")
    ]
    assert schemas[0].equals(schemas[1])
    assert "target_inclusion" not in schemas[0].names
