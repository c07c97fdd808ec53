"""Records are folded, taken out and finished without a loss, whatever the moment of a kill."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.io.finalize import ShardsMissing
from pipeline.cache.layout.fold import blocks, fold, reopen
from pipeline.cache.layout.manifest import Manifest, read_manifest
from pipeline.cache.layout.names import (
    RECORDS,
    SegmentName,
    parse_segment,
    parse_shard,
    record_name,
    segment_name,
    shard_name,
)
from pipeline.cache.layout.recorded import Recorded
from pipeline.cache.layout.records import decode_segment, encode_record, encode_segment
from pipeline.cache.tools.derive import recorded_shards
from pipeline.errors import CacheError
from pipeline.storage import Store
from tests.unit.cache.records import (
    Killed,
    commit_made_up,
    contents,
    counted,
    finalize_made_up,
    made_up_record,
)

SHARDS = {"train": 6, "heldout": 2}
_urls = (f"memory://fold-{number}/cache" for number in itertools.count())


def _keys(shards: dict[str, int]) -> list[tuple[str, int]]:
    return [(split, index) for split, count in shards.items() for index in range(count)]


def _filled(shards: dict[str, int] = SHARDS) -> Store:
    store = Store(next(_urls))
    for key in _keys(shards):
        commit_made_up(store, *key)
    return store


def _whole(shards: dict[str, int] = SHARDS) -> dict[str, bytes]:
    store = _filled(shards)
    finalize_made_up(store, shards)
    return dict(contents(store))


def test_names_of_any_number() -> None:
    assert segment_name("train", 7, 7) == "_meta/shards/train-00007.parquet"
    assert segment_name("train", 0, 1023) == "_meta/shards/train-00000-01023.parquet"
    assert segment_name("heldout", 199_680, 199_999) == "_meta/shards/heldout-199680-199999.parquet"
    assert shard_name("train", 123_456) == "data/train/123456.parquet"
    for name in (
        SegmentName("train", 99_328, 100_351),
        SegmentName("heldout", 1_000_000, 1_000_000),
    ):
        assert parse_segment(name.path.rsplit("/", 1)[-1]) == name
    for wrong in (
        "train-7.parquet", "train-000007.parquet", "test-00007.parquet", "train-00007.json",
        "train-00007-00007.parquet", "train-00009-00008.parquet", "train-01023-01024.parquet",
        "train-00007.parquet.partial", "train-0100000.parquet",
    ):  # fmt: skip
        assert parse_segment(wrong) is None, wrong
    assert parse_shard("train-100000") == parse_shard("train/100000") == ("train", 100_000)
    assert parse_shard("train-0100000") is None
    assert parse_shard("trian-00001") is None


@given(st.sets(st.integers(0, 3000)), st.integers(0, 3000))
def test_a_listing_tells_what_is_recorded(indexes: set[int], count: int) -> None:
    files = [record_name("train", index).rsplit("/", 1)[-1] for index in indexes]
    files += ["train-01024-01030.parquet", "heldout-00000.parquet", "notes.txt"]
    wanted = indexes | set(range(1024, 1031))
    found = Recorded(files)
    assert set(found.shards("train")) == wanted
    assert len(found) == len(wanted) + 1
    assert found.count("train", count) == sum(index < count for index in wanted)
    assert list(found.missing("train", count)) == [i for i in range(count) if i not in wanted]
    assert all((("train", index) in found) == (index in wanted) for index in range(0, 3000, 7))


def test_no_bit_of_a_segment_passes() -> None:
    name = SegmentName("train", 3, 5)
    records = [made_up_record("train", index) for index in name.shards]
    raw = encode_segment(records)
    assert decode_segment(raw, name) == records
    assert encode_segment(records) == raw
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        assert decode_segment(bytes(damaged), name) is None, at
    for other in (
        SegmentName("train", 3, 4),
        SegmentName("heldout", 3, 5),
        SegmentName("train", 4, 6),
    ):
        assert decode_segment(raw, other) is None


def test_a_shard_without_rows_has_a_record() -> None:
    record = made_up_record("train", 0, rows=0)
    (found,) = decode_segment(encode_record(record), SegmentName("train", 0, 0)) or []
    assert found == record
    assert found.sample_ids() == []


def test_what_is_folded_is_one_file_of_the_same_records() -> None:
    store = _filled()
    (train, heldout) = blocks(SHARDS)
    folded = fold(store, train)
    assert folded.segment is not None
    assert (folded.segment.path, folded.segment.rows) == (train.path, 12)
    assert store.list(RECORDS) == [
        "heldout-00000.parquet", "heldout-00001.parquet", "train-00000-00005.parquet",
    ]  # fmt: skip
    assert decode_segment(store.read(train.path), train) == [
        made_up_record("train", index) for index in range(6)
    ]
    raw = store.read(train.path)
    again = fold(store, train)
    assert (again, store.read(train.path)) == (folded, raw)
    store.delete(record_name("heldout", 1))
    assert fold(store, heldout).missing == (("heldout", 1),)
    assert "heldout-00000.parquet" in store.list(RECORDS)


def test_a_block_ends_at_a_multiple_of_1024() -> None:
    assert [name.path for name in blocks({"train": 2049, "heldout": 1024})] == [
        "_meta/shards/train-00000-01023.parquet", "_meta/shards/train-01024-02047.parquet",
        "_meta/shards/train-02048.parquet", "_meta/shards/heldout-00000-01023.parquet",
    ]  # fmt: skip


def test_a_damaged_file_of_records_is_gone_and_its_shards_are_missing() -> None:
    store = _filled()
    store.write(record_name("train", 2), b"PAR1 half of a record")
    with pytest.raises(
        ShardsMissing, match=r"1 of 8 shards .*: train-00002; run the same"
    ) as error:
        finalize_made_up(store, SHARDS)
    assert error.value.missing == (("train", 2),)
    assert ("train", 2) not in Recorded(store.list(RECORDS))
    assert len(Recorded(store.list(RECORDS))) == 7
    commit_made_up(store, "train", 2)
    finalize_made_up(store, SHARDS)
    assert dict(contents(store)) == _whole()
    # One of a folded segment: all of its shards.
    raw = store.read("_meta/shards/train-00000-00005.parquet")
    store.write("_meta/shards/train-00000-00005.parquet", raw[:-1])
    store.delete("_meta/manifest.json")
    with pytest.raises(ShardsMissing, match="6 of 8 shards"):
        finalize_made_up(store, SHARDS)


def test_shards_of_another_size_are_missing_and_no_longer_recorded() -> None:
    store = _filled()
    fold(store, next(blocks(SHARDS)))
    store.write(shard_name("train", 3), b"cut")
    store.delete(shard_name("heldout", 0))
    with pytest.raises(ShardsMissing) as error:
        finalize_made_up(store, SHARDS)
    assert error.value.missing == (("train", 3), ("heldout", 0))
    left = Recorded(store.list(RECORDS))
    assert [key for key in _keys(SHARDS) if key not in left] == [("train", 3), ("heldout", 0)]
    for key in error.value.missing:
        commit_made_up(store, *key)
    finalize_made_up(store, SHARDS)
    assert dict(contents(store)) == _whole()


def test_records_that_were_not_planned_are_missing() -> None:
    store = _filled()
    commit_made_up(store, "train", 1, rows=1)
    with pytest.raises(ShardsMissing, match="train-00001"):
        finalize_made_up(store, SHARDS, accept=lambda record: record.rows == 2)
    assert ("train", 1) not in Recorded(store.list(RECORDS))


def test_the_shard_decides_between_two_records() -> None:
    """A worker that was overtaken recorded other rows; the file of the later one is there."""
    for stale_first in (True, False):
        store = _filled()
        right, stale = made_up_record("train", 1), made_up_record("train", 1, xxh3_128="0" * 32)
        one, two = (stale, right) if stale_first else (right, stale)
        others = [made_up_record("train", 0), one]
        store.write(segment_name("train", 0, 1), encode_segment(others))
        store.write(record_name("train", 1), encode_record(two))
        finalize_made_up(store, SHARDS)
        assert dict(contents(store)) == _whole()


def test_reopened_shards_are_missing_and_no_others() -> None:
    store = _filled()
    finalize_made_up(store, SHARDS)
    assert reopen(store, []) == ()
    assert store.exists("_meta/manifest.json")
    assert reopen(store, [("train", 0), ("train", 3)]) == (("train", 0), ("train", 3))
    assert store.list(RECORDS) == [
        "heldout-00000-00001.parquet", "train-00001-00002.parquet", "train-00004-00005.parquet",
    ]  # fmt: skip
    with pytest.raises(CacheError, match="no cache there"):
        read_manifest(store)
    for index in (0, 3):
        commit_made_up(store, "train", index)
    finalize_made_up(store, SHARDS)
    assert dict(contents(store)) == _whole()
    store.write("_meta/shards/train-00000-00005.parquet", b"damaged")
    assert reopen(store, [("train", 4)]) == tuple(("train", index) for index in range(6))


def test_what_was_folded_since_it_was_listed_is_found() -> None:
    """Another worker folds; the listing of this one names files that are gone."""
    store = _filled()
    listed = Recorded(store.list(RECORDS))
    (train, _) = blocks(SHARDS)
    folded = fold(store, train)
    assert fold(store, train, recorded=listed) == folded
    assert reopen(store, [("train", 2)], recorded=listed) == (("train", 2),)
    left = Recorded(store.list(RECORDS))
    assert list(left.missing("train", 6)) == [2]


def test_a_record_without_a_file_is_found_by_the_listing() -> None:
    store = _filled()
    finalize_made_up(store, SHARDS)
    store.delete("_meta/manifest.json")
    sizes = recorded_shards(store, SHARDS)
    assert sizes == {key: made_up_record(*key).bytes for key in _keys(SHARDS)}
    store.delete(shard_name("train", 5))
    assert ("train", 5) not in recorded_shards(store, SHARDS)
    assert ("train", 5) not in Recorded(store.list(RECORDS))


def _finish_after_kills(
    url: str, kills: list[tuple[int, bool]], spoiled: set[tuple[str, int]]
) -> Manifest:
    """Finish a cache in processes of which all but the last are killed at some request."""
    intact = set(_keys(SHARDS)) - spoiled
    for at, after in [*kills, (None, False)]:
        store, requests = counted(url)
        requests.killed_at, requests.after = at, after
        try:
            return finalize_made_up(store, SHARDS)
        except Killed:
            recorded = Recorded(Store(url).list(RECORDS))
            assert not {key for key in intact if key not in recorded}, "a record is lost"
        except ShardsMissing as error:
            requests.killed_at = None
            for key in error.missing:
                commit_made_up(store, *key)
    store = Store(url)
    return finalize_made_up(store, SHARDS)


KILLS = st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=4)


@settings(max_examples=50, deadline=None)
@given(
    kills=KILLS,
    lost=st.sets(st.sampled_from(_keys(SHARDS)), max_size=2),
    cut=st.sets(st.sampled_from(_keys(SHARDS)), max_size=2),
    folded=st.booleans(),
)
def test_finished_to_the_same_bytes_whatever_is_killed(
    kills: list[tuple[int, bool]],
    lost: set[tuple[str, int]],
    cut: set[tuple[str, int]],
    folded: bool,
) -> None:
    store = _filled()
    if folded:
        fold(store, next(blocks(SHARDS)))
    reopen(store, lost)
    for key in cut:
        store.write(shard_name(*key), b"cut")
    _finish_after_kills(store.url, kills, lost | cut)
    assert dict(contents(Store(store.url))) == _whole()


@settings(max_examples=50, deadline=None)
@given(
    at=st.integers(0, 20),
    after=st.booleans(),
    shards=st.sets(st.sampled_from(_keys(SHARDS)), min_size=1, max_size=3),
)
def test_a_killed_reopen_loses_no_other_record(
    at: int, after: bool, shards: set[tuple[str, int]]
) -> None:
    """Either a shard is still recorded, or it is one of those; and then the cache is incomplete."""
    url = _filled().url
    finalize_made_up(Store(url), SHARDS)
    store, requests = counted(url)
    requests.killed_at, requests.after = at, after
    with contextlib.suppress(Killed):
        reopen(store, shards)
    store = Store(url)
    recorded = Recorded(store.list(RECORDS))
    missing = {key for key in _keys(SHARDS) if key not in recorded}
    assert missing <= shards
    assert not missing or not store.exists("_meta/manifest.json")
    assert set(reopen(store, shards)) == shards
    for key in shards:
        commit_made_up(store, *key)
    finalize_made_up(store, SHARDS)
    assert dict(contents(store)) == _whole()


def test_what_is_taken_out_by_a_kill_is_not_taken_from_a_contradicting_file() -> None:
    """The smaller file that would be written is there already, with the right record."""
    store = _filled()
    stale = replace(made_up_record("train", 1), xxh3_128="0" * 32)
    store.write(
        segment_name("train", 0, 2),
        encode_segment([made_up_record("train", 0), stale, made_up_record("train", 2)]),
    )
    reopen(store, [("train", 0), ("train", 2)])
    raw = store.read(record_name("train", 1))
    assert raw == encode_record(made_up_record("train", 1))
