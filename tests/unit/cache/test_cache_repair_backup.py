"""A repair that was killed and run again restores what the first one found, not what it left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.layout.names import record_name
from pipeline.cache.tools import repair, repair_backup
from pipeline.cache.tools.repair import plan_repair, repair_cache
from pipeline.cache.tools.verify import verify_cache
from pipeline.storage import Store
from tests.conftest import digests
from tests.unit.cache.planned_cache import SEGMENT, flip, write_planned_cache
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
    assert "restore the manifest and records that an interrupted repair" in capsys.readouterr().out
    assert digests(tmp_path) == before
    repair_backup.restore_manifest(store)
    repair_cache(store, plan_repair(store, verify_cache(store)), finished)
    assert store.read("README.md") == card
    assert verify_cache(store) == []
