"""In which order files come and go: a kill between two of them must leave no cache with a hole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.io.finalize import ShardsMissing
from pipeline.cache.io.writer import commit_shard
from pipeline.cache.layout.names import MANIFEST, RECORDS, record_name, shard_name
from pipeline.cache.layout.quarantine import (
    QuarantinedRow,
    clear_quarantine,
    quarantine_name,
    quarantine_rows,
    read_quarantined_rows,
)
from pipeline.storage import Store
from tests.unit.cache.records import (
    commit_made_up,
    finalize_made_up,
    made_up_data,
    made_up_record,
)

ONE, OTHER = (QuarantinedRow(f"{number:032x}", "fails", 2) for number in (1, 2))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "cache"))


@pytest.fixture
def requests(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of what is written and deleted, in order."""
    done: list[str] = []

    def told(real: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(name: str, *args: Any, **options: Any) -> Any:
            done.append(f"{what} {name}")
            return real(name, *args, **options)

        return call

    for what in ("write", "delete"):
        monkeypatch.setattr(store, what, told(getattr(store, what), what))
    return done


def test_a_record_comes_after_its_shard(store: Store, requests: list[str]) -> None:
    commit_shard(store, made_up_record("train", 0), made_up_data("train", 0))
    assert requests == [
        f"write {shard_name('train', 0)}",
        f"write {record_name('train', 0)}",
    ]


def test_the_manifest_comes_last(store: Store, requests: list[str]) -> None:
    commit_made_up(store, "train", 0)
    finalize_made_up(store, {"train": 1})
    assert requests[-2:] == ["write README.md", f"write {MANIFEST}"]


def test_what_lacks_a_shard_has_no_manifest(store: Store, requests: list[str]) -> None:
    for index in range(2):
        commit_made_up(store, "train", index)
    finalize_made_up(store, {"train": 2})
    store.write(shard_name("train", 1), b"cut")
    requests.clear()
    with pytest.raises(ShardsMissing):
        finalize_made_up(store, {"train": 2})
    assert not store.exists(MANIFEST)
    assert requests[0] == f"delete {MANIFEST}", "before anything else is changed"


def test_the_first_list_of_failed_rows_stays(store: Store) -> None:
    assert quarantine_rows(store, "train-00000", [ONE])
    assert not quarantine_rows(store, "train-00000", [OTHER])
    assert read_quarantined_rows(store, "train-00000") == (ONE,)


_OTHER_DIGEST = b'{"shard": "train-00000", "rows": [], "quarantine_sha256": "00"}'


@pytest.mark.parametrize("damage", [b"", b"{", _OTHER_DIGEST.replace(b"256", b""), _OTHER_DIGEST])
def test_a_damaged_list_makes_room_for_another(store: Store, damage: bytes) -> None:
    store.write(quarantine_name("train-00000"), damage)
    assert read_quarantined_rows(store, "train-00000") == ()
    assert quarantine_rows(store, "train-00000", [ONE])


def test_rows_that_are_tried_again_are_unrecorded_before_their_list_goes(
    store: Store, requests: list[str]
) -> None:
    for index in range(2):
        commit_made_up(store, "train", index)
    finalize_made_up(store, {"train": 2})
    quarantine_rows(store, "train-00001", [ONE])
    requests.clear()
    assert clear_quarantine(store) == 1
    assert store.list(RECORDS) == ["train-00000.parquet"]
    assert not store.exists(MANIFEST)
    assert requests[-1] == f"delete {quarantine_name('train-00001')}"
