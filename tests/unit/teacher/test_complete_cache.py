"""A cache that is there already: what of it is made again, and what the engine is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.cache.layout.names import MANIFEST, RECORDS, shard_name
from pipeline.cache.layout.quarantine import QuarantinedRow, quarantine_rows
from pipeline.corpus.sample import Sample
from pipeline.storage import Store
from pipeline.teacher.capture.complete import complete_cache
from pipeline.teacher.capture.plan import capture_requests, settle_plan
from tests.unit.cache.records import commit_made_up, finalize_made_up, made_up_data
from tests.unit.cache.sample_cache import sample_identity


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return a complete cache of three shards, of which one goes without a row."""
    store = Store(str(tmp_path / "cache"))
    settle_plan(store, sample_identity())
    for index in range(3):
        commit_made_up(store, "train", index)
    quarantine_rows(store, "train-00001", [QuarantinedRow("0" * 32, "fails", 2)])
    finalize_made_up(store, {"train": 3}, rows_quarantined=1)
    return store


def test_a_whole_one_needs_no_work(store: Store) -> None:
    manifest = complete_cache(store, sample_identity(), checksums=True)
    assert manifest is not None
    assert manifest.total().shards == 3


def test_a_lost_list_of_failed_rows_has_them_tried_again(store: Store) -> None:
    store.delete("_meta/quarantine/train-00001.json")
    assert complete_cache(store, sample_identity(), checksums=False) is None
    assert not store.exists(MANIFEST)


@pytest.mark.parametrize("checksums", [False, True])
def test_a_damaged_shard_is_unrecorded(store: Store, checksums: bool) -> None:
    data = made_up_data("train", 2)
    store.write(shard_name("train", 2), data[::-1] if checksums else data[:-1])
    assert complete_cache(store, sample_identity(), checksums=checksums) is None
    assert store.list(RECORDS) == ["train-00000-00001.parquet"]
    assert not store.exists(MANIFEST)


def test_the_row_before_a_supervised_token_predicts_it() -> None:
    sample = Sample(
        "0" * 32, "train", np.arange(5, dtype=np.int32),
        np.array([False, True, False, False, True]), 0, 0,
    )  # fmt: skip
    (request,) = capture_requests([sample])
    assert request.rows_N.tolist() == [0, 3]
    assert request.input_ids_L.tolist() == [0, 1, 2, 3, 4]
