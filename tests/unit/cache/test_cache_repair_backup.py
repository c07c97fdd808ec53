"""A repair that was killed and run again restores what the first one found, not what it left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.layout.fold import reopen
from pipeline.cache.layout.names import RECORDS, record_name
from pipeline.cache.tools import repair, repair_backup
from pipeline.cache.tools.repair import plan_repair, repair_cache
from pipeline.cache.tools.verify import verify_cache
from pipeline.errors import CacheError
from pipeline.storage import Store
from tests.conftest import digests
from tests.unit.cache.planned_cache import SEGMENT, flip, write_planned_cache
from tests.unit.cache.records import commit_made_up
from tests.unit.cache.sample_cache import SHARD, sample_shard


def test_a_second_repair_keeps_the_first_ones_backup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_planned_cache(str(tmp_path))
    store = Store(str(tmp_path))
    card, records = store.read("README.md"), store.read(SEGMENT)
    manifest = store.read("_meta/manifest.json")
    flip(tmp_path / SHARD, 1000)

    def killed(_arguments: Sequence[str]) -> int:
        store.write("README.md", b"the repair's own card")
        raise SystemExit(137)

    # A killed process restores nothing.
    with monkeypatch.context() as patch:
        patch.setattr(repair, "put_back", lambda _store, _removed: None)
        with pytest.raises(SystemExit):
            repair_cache(store, plan_repair(store, verify_cache(store)), killed)
    assert store.read("README.md") == b"the repair's own card"

    def finished(_arguments: Sequence[str]) -> int:
        store.write(SHARD, sample_shard("train", 1, 3)[1])
        store.write(SEGMENT, records)
        store.delete(record_name("train", 0))  # what is left of the segment meanwhile
        store.write("README.md", b"the repair's own card")
        store.write("_meta/manifest.json", manifest)
        return 0

    before = digests(tmp_path)
    assert not store.exists("_meta/manifest.json")
    assert main(["repair", str(tmp_path), "--dry-run"]) == 0
    assert "restore what an interrupted repair backed up" in capsys.readouterr().out
    assert digests(tmp_path) == before
    repair_backup.restore(store)
    repair_cache(store, plan_repair(store, verify_cache(store)), finished)
    assert store.read("README.md") == card
    assert verify_cache(store) == []


CONFIG = "_meta/config.yaml"


def _write_configured(folder: Path) -> Store:
    write_planned_cache(str(folder))
    store = Store(str(folder))
    store.write(CONFIG, b"cache: {}\n")
    return store


@pytest.mark.parametrize("left", [("README.md",), (CONFIG,), ("README.md", CONFIG)])
def test_killed_after_the_manifest_and_before_the_end(
    left: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Stage one has written a whole cache, with the repair's own command and address."""
    store = _write_configured(tmp_path)
    whole = digests(tmp_path)
    files = {name: store.read(name) for name in whole}
    flip(tmp_path / SHARD, 1000)

    def finished_and_killed(_arguments: Sequence[str]) -> int:
        for name, data in files.items():
            store.write(name, data)
        store.delete(record_name("train", 0))
        for name in left:
            store.write(name, b"the repair's own")
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(repair, "put_back", lambda _store, _removed: None)
        with pytest.raises(SystemExit):
            repair_cache(store, plan_repair(store, verify_cache(store)), finished_and_killed)
    assert verify_cache(store) == []  # nothing to repair, but the two files are not those of before
    assert main(["repair", str(tmp_path), "--dry-run"]) == 0
    assert "restore what an interrupted repair backed up" in capsys.readouterr().out
    assert main(["repair", str(tmp_path)]) == 0
    assert digests(tmp_path) == whole


def test_after_a_failure_an_edited_configuration_stays(tmp_path: Path) -> None:
    store = _write_configured(tmp_path)
    flip(tmp_path / SHARD, 1000)

    def failing(_arguments: Sequence[str]) -> int:
        store.write(CONFIG, b"the repair's own")
        return 3

    with pytest.raises(CacheError):
        repair_cache(store, plan_repair(store, verify_cache(store)), failing)
    assert store.read(CONFIG) == b"cache: {}\n"
    store.write(CONFIG, b"cache: {edited: true}\n")
    repair_backup.restore(store)
    assert store.read(CONFIG) == b"cache: {edited: true}\n"


def test_backups_of_another_cache_are_forgotten(tmp_path: Path) -> None:
    store = _write_configured(tmp_path)
    store.write("_meta/repair/identity", b"of another cache")
    store.write("_meta/repair/config.yaml", b"of another cache")
    repair_backup.restore(store)
    assert store.read(CONFIG) == b"cache: {}\n"
    assert not repair_backup.is_interrupted(store)


def test_what_was_kept_first_stays(tmp_path: Path) -> None:
    store = _write_configured(tmp_path)
    card = store.read("README.md")
    kept = repair_backup.keep(store, [("train", 0)])
    store.write("README.md", b"the repair's own card")
    again = repair_backup.keep(store, [("train", 0)])
    assert again["README.md"] == kept["README.md"] == card


def test_with_the_manifest_come_its_records_and_no_others(tmp_path: Path) -> None:
    store = _write_configured(tmp_path)
    manifest, records = store.read("_meta/manifest.json"), store.list(RECORDS)
    repair_backup.keep(store, [("train", 0)])
    reopen(store, [("train", 0)])
    commit_made_up(store, "train", 7)  # by a stage one that was killed
    assert store.list(RECORDS) != records
    repair_backup.put_back(store, {})
    assert store.read("_meta/manifest.json") == manifest
    assert store.list(RECORDS) == records
    (tmp_path / "data/train/00007.parquet").unlink()
    assert verify_cache(store) == []
