"""A derived cache goes into a folder of its own, and holds the shards that were planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.io.finalize import ShardsMissing
from pipeline.cache.layout.inventory import Plan, PlannedRows, encode_plan
from pipeline.cache.layout.names import MANIFEST, PLAN, RECORDS
from pipeline.cache.tools.derive import fill, finish, reserve_folder
from pipeline.errors import CacheError
from pipeline.storage import Store
from tests.unit.cache.records import (
    commit_made_up,
    finalize_made_up,
    made_up_data,
    made_up_record,
)
from tests.unit.cache.sample_cache import SPEC, TEMPERATURES, sample_identity

SHARDS = (PlannedRows("train", 0, 2, 14, None),)  # as `made_up_record` has them


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "cache"))


def test_a_folder_that_another_command_has_begun_is_left_alone(store: Store) -> None:
    plan = Plan(sample_identity(), SHARDS)
    raw = encode_plan(plan)
    reserve_folder(store, plan, raw)
    reserve_folder(store, plan, raw)  # the same command again
    other = Plan(sample_identity(), (PlannedRows("train", 0, 3, 21, None),))
    with pytest.raises(CacheError, match="another plan"):
        reserve_folder(store, other, encode_plan(other))
    assert store.read(PLAN) == raw


@pytest.mark.parametrize("other", [{}, {"rows": 3}, {"tokens": 15}])
def test_a_shard_of_other_rows_is_made_again(store: Store, other: dict[str, Any]) -> None:
    commit_made_up(store, "train", 0, **other)

    def end() -> Any:
        return finish(
            store, SHARDS, identity=sample_identity(), spec=SPEC, temperatures=TEMPERATURES,
            tokenizer={}, corpus_counts=None, command="made by a test",
        )  # fmt: skip

    if not other:
        assert end().total().rows == 2
        return
    with pytest.raises(ShardsMissing, match="train-00000"):
        end()


def test_while_shards_are_made_again_the_cache_does_not_look_complete(store: Store) -> None:
    """Its records are lost, its manifest is not."""
    commit_made_up(store, "train", 0)
    finalize_made_up(store, {"train": 1})
    store.delete(f"{RECORDS}/{store.list(RECORDS)[0]}")

    def make(place: int) -> Any:
        assert not store.exists(MANIFEST)
        return made_up_record("train", place), made_up_data("train", place)

    rows: list[int] = []
    assert fill(store, SHARDS, make, rows.append) == []
    assert rows == [0, 2]
