"""`verify` in processes, interrupted and continued; many samples; damaged shards for stage one."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.layout.manifest import read_manifest
from pipeline.cache.layout.names import CHECKS, shard_name
from pipeline.cache.tools.checking import check_files, verify_state
from pipeline.cache.tools.checking.sample_ids import SampleIds
from pipeline.cache.tools.verify import find_damaged, verify_cache
from pipeline.errors import ResourceError, run_command
from pipeline.storage import Store
from pipeline.storage.parallel import in_processes
from tests.unit.cache.planned_cache import flip
from tests.unit.cache.records import commit_made_up, finalize_made_up, made_up_record
from tests.unit.cache.sample_cache import SHARD

MANY = 70


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def many(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "many"))
    for index in range(MANY):
        commit_made_up(store, "train", index)
    finalize_made_up(store, {"train": MANY})
    return store


def _square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def test_processes_answer_in_order() -> None:
    answers = list(in_processes(_square, range(7), 2))
    assert [square for square, _ in answers] == [number * number for number in range(7)]
    assert os.getpid() not in {process for _, process in answers}


def test_shards_are_compared_in_processes(many: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in (3, 69):
        flip(Path(many.root) / shard_name("train", index), 2)
    wanted = {shard_name("train", index) for index in (3, 69)}
    used: list[int] = []
    real = check_files.in_processes

    def watched(function: object, items: object, workers: int) -> object:
        used.append(workers)
        return real(function, items, workers)  # type: ignore[arg-type,type-var]

    monkeypatch.setattr(check_files, "in_processes", watched)
    assert {f.name for f in verify_cache(many, workers=2)} == wanted
    assert used == [2]
    findings = find_damaged(many, read_manifest(many), workers=2)
    assert [finding.shard for finding in findings] == [("train", 3), ("train", 69)]
    assert all(finding.reason.startswith("checksum ") for finding in findings)


def test_damaged_shards_by_size_checksum_and_rows(cache_dir: Path) -> None:
    store = Store(str(cache_dir))
    manifest = read_manifest(store)
    assert [find_damaged(store, manifest, check=check) for check in CHECKS] == [[], [], []]
    flip(cache_dir / SHARD, 40)
    assert find_damaged(store, manifest, check="size") == []
    for check in ("checksum", "decode"):
        assert [f.shard for f in find_damaged(store, manifest, check=check)] == [("train", 1)]
    (cache_dir / SHARD).unlink()
    (finding,) = find_damaged(store, manifest, check="size")
    assert (finding.shard, finding.reason) == (("train", 1), "missing")


def test_an_interrupted_run_goes_on(
    many: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[str] = []
    real = check_files.read_shard

    def until(store: Store, record: object) -> bytes:
        read.append(record.path)  # type: ignore[attr-defined]
        if len(read) == 40:
            raise KeyboardInterrupt
        return real(store, record)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(check_files, "read_shard", until)
        with pytest.raises(KeyboardInterrupt):
            verify_cache(many, workers=1)
    flip(Path(many.root) / shard_name("train", 60), 2)
    patched: list[str] = []
    monkeypatch.setattr(
        check_files,
        "read_shard",
        lambda store, record: (patched.append(record.path), real(store, record))[1],
    )
    rows: list[int] = []
    resumed: list[int] = []
    findings = verify_cache(many, workers=1, on_rows=rows.append, on_resume=resumed.append)
    assert [finding.name for finding in findings] == [shard_name("train", 60)]
    assert sum(rows) == 2 * MANY
    assert 16 <= resumed[0] <= 40
    assert len(patched) == MANY - resumed[0]
    # A run that came to its end leaves nothing: the next one reads everything.
    patched.clear()
    assert run_command(lambda: main(["verify", many.url, "--workers", "1"])) == 3
    assert len(patched) == MANY
    assert "by a run that was interrupted" not in capsys.readouterr().err


def test_what_an_interrupted_run_found_is_good_for_a_day_and_for_its_cache(
    many: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ("a", "checksum", "m")
    verify_state.VerifyState(*key).add([("train", 3), ("heldout", 100_000)])
    (file,) = (tmp_path / "home/distill").iterdir()
    with file.open("a") as torn:
        torn.write("train-000")
    assert verify_state.VerifyState(*key).intact == {("train", 3), ("heldout", 100_000)}
    for other in (("b", "checksum", "m"), ("a", "decode", "m"), ("a", "checksum", "n")):
        assert verify_state.VerifyState(*other).intact == frozenset()
    old = time.time() - 25 * 3600
    os.utime(file, (old, old))
    assert verify_state.VerifyState(*key).intact == frozenset()
    assert not file.exists()
    # Where nothing can be written, a run only cannot be continued.
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert verify_cache(many, workers=1) == []


@pytest.mark.parametrize("in_memory", [10**6, 50, 1])
def test_repeats_are_counted_whatever_fits_into_memory(in_memory: int) -> None:
    rng = np.random.default_rng(in_memory)
    # Ids that end with zero bytes, or differ in the last bit alone, are not the same.
    pool = [rng.bytes(3) + b"\0" * 13 for _ in range(60)]
    pool += [pool[0][:15] + b"\1", b"\0" * 16, b"\0" * 15 + b"\1"]
    shards = [[pool[n] for n in rng.integers(0, len(pool), 20)] for _ in range(9)]
    ids = SampleIds(in_memory=in_memory)
    for owner, rows in enumerate(shards):
        ids.add(b"".join(rows), owner)
    found = ids.repeats(6)
    seen: dict[bytes, int] = {}
    again: Counter[int] = Counter()
    across: Counter[int] = Counter()
    for owner, rows in enumerate(shards):
        for row in rows:
            if row in seen:
                again[owner] += 1
                across[owner] += seen[row] < 6 <= owner
            seen[row] = owner
    assert found.rows == again.total()
    assert found.by_owner == again
    assert found.across == +across
    assert SampleIds().repeats(0).rows == 0


def test_a_sample_in_both_splits_of_many_is_found(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "both"))
    for index in range(3):
        commit_made_up(store, "train", index)
    same = made_up_record("train", 1).row_ids
    commit_made_up(store, "heldout", 0, row_ids=same)
    finalize_made_up(store, {"train": 3, "heldout": 1})
    (finding,) = verify_cache(store)
    assert finding.name == shard_name("heldout", 0)
    assert finding.reason == "2 of its samples are in the other split too"


def test_a_full_scratch_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "r+b", buffering=0) as full:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: full)
        ids = SampleIds(in_memory=1)
        ids.add(bytes(64), 0)
        with pytest.raises(ResourceError, match=r"disk is full: \d.* of sample ids .*TMPDIR"):
            ids.repeats(1)
    monkeypatch.setattr("tempfile.TemporaryFile", _no_folder)
    with pytest.raises(ResourceError, match=r"sample ids cannot be kept there \(No such"):
        SampleIds(in_memory=1).add(bytes(64), 0)


def _no_folder(**_: object) -> None:
    raise FileNotFoundError(2, "No such file or directory")
