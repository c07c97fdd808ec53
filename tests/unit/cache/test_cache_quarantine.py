"""A cache with quarantined rows is complete, and its parts can be merged."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.io.finalize import finalize
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.writer import commit_shard, encode_shard
from pipeline.cache.layout.inventory import read_inventory
from pipeline.cache.layout.manifest import read_manifest
from pipeline.cache.layout.names import CHECKS, PLAN, RECORDS
from pipeline.cache.layout.quarantine import (
    QuarantinedRow,
    decode_quarantine,
    describe_quarantine,
    quarantine_name,
    quarantine_rows,
    read_quarantine,
    read_quarantined_rows,
)
from pipeline.cache.tools.repair import plan_repair, repair_cache
from pipeline.cache.tools.verify import verify_cache
from pipeline.config import fingerprint
from pipeline.errors import CacheError, RowsQuarantined
from pipeline.storage import Store
from tests.conftest import digests
from tests.unit.cache.planned_cache import SEGMENT, flip, lose, write_planned_cache
from tests.unit.cache.sample_cache import (
    SHARD,
    SPEC,
    TEMPERATURES,
    read_all,
    sample_identity,
    sample_rows,
    sample_shard,
)

LIST = quarantine_name("train-00001")
KEY = ("train", 1)


def _write(url: str, lost: Sequence[int]) -> None:
    """Write a planned cache whose shard train/00001 lacks these of its three rows."""
    write_planned_cache(url)
    store, identity = Store(url), sample_identity()
    rows, tails = sample_rows(3, seed=1)
    kept = [place for place in range(3) if place not in lost]
    if lost:
        failed = [QuarantinedRow(rows[place].sample_id, "not finite", 3) for place in lost]
        assert quarantine_rows(store, "train-00001", failed)
    record, data = encode_shard(
        [rows[place] for place in kept], SPEC, split="train", index=1, temperatures=TEMPERATURES,
        identity_digest=fingerprint(identity), tails=[tails[place] for place in kept],
    )  # fmt: skip
    commit_shard(store, record, data)
    records = [sample_shard("train", 0, 5)[0], record, sample_shard("heldout", 0, 2)[0]]
    counts = {"rows": 10, **({"rows_quarantined": len(lost)} if lost else {})}
    finalize(
        store, Counter(r.split for r in records),
        identity=identity, spec=SPEC, temperatures=TEMPERATURES,
        corpus_counts=counts, tokenizer_files=["tokenizer.json"], command="made by a test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def made_without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without") / "cache"
    _write(str(folder), [1])
    return folder


@pytest.fixture
def without(made_without: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_without, tmp_path / "cache"))


def _damaged(folder: Path, *, check: str = "checksum") -> dict[str, str]:
    return {f.name: f.reason for f in verify_cache(Store(str(folder)), check=check)}


def _run_by_hand(folder: Path, plan_of: Path) -> Callable[[Sequence[str]], int]:
    """Return a stand-in for stage one: it writes shard and manifest, and exits as with a
    quarantined row."""

    def run(_arguments: Sequence[str]) -> int:
        for name in (SHARD, LIST, PLAN, "_meta/manifest.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(plan_of / name, folder / name)
        shutil.rmtree(folder / RECORDS)
        shutil.copytree(plan_of / RECORDS, folder / RECORDS)
        return RowsQuarantined.exit_code

    return run


def test_rows_quarantined_are_no_damage(without: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(without)
    for check in CHECKS:
        assert _damaged(without, check=check) == {}
    assert main(["inspect", str(without)]) == 0
    assert "1 rows that the teacher fails on" in capsys.readouterr().out
    (without / "_meta/manifest.json").unlink()
    assert set(_damaged(without)) == {"_meta/manifest.json"}
    del before["_meta/manifest.json"]
    assert digests(without) == before  # stage one removes damaged lists, readers remove nothing


def test_a_shard_without_any_row(tmp_path: Path) -> None:
    _write(str(tmp_path / "cache"), [0, 1, 2])
    assert _damaged(tmp_path / "cache") == {}


def test_a_damaged_or_lost_list_is_found_and_named(without: Path) -> None:
    file = without / LIST
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    for at in [0, len(data) - 1, *rng.choice(len(data), 60, replace=False).tolist()]:
        file.write_bytes(data)
        flip(file, at, int(rng.integers(8)))
        assert set(_damaged(without)) == {LIST}, at
        assert file.exists()
    file.unlink()
    assert _damaged(without) == {LIST: f"missing: 1 rows of {SHARD} were quarantined"}


def test_lists_that_say_something_else_than_the_shard(without: Path) -> None:
    rows, _ = sample_rows(3, seed=1)
    store = Store(str(without))
    for ids, says in (
        ([rows[0].sample_id], f"1 of its rows are in {SHARD} nevertheless"),
        ([rows[0].sample_id, rows[1].sample_id], "plans 3 rows"),
    ):
        (without / LIST).unlink()
        quarantine_rows(store, "train-00001", [QuarantinedRow(name, "x", 1) for name in ids])
        assert any(says in reason for reason in _damaged(without).values())
    (without / LIST).unlink()
    quarantine_rows(store, "train-00001", [QuarantinedRow(rows[1].sample_id, "not finite", 3)])
    quarantine_rows(store, "train-00009", [QuarantinedRow(rows[1].sample_id, "x", 1)])
    assert _damaged(without) == {
        quarantine_name("train-00009"): "belongs to no shard of this cache"
    }
    plan = plan_repair(store, verify_cache(store))
    assert plan.remove == (quarantine_name("train-00009"),)
    assert not plan.stage_one


def test_repair_makes_what_a_lost_list_leaves_open(without: Path) -> None:
    store = Store(str(without))
    flip(without / SEGMENT, 30)  # a record follows from the shard, whatever was planned
    plan = plan_repair(store, verify_cache(store))
    assert ([name.path for name in plan.rebuild], plan.stage_one) == ([SEGMENT], False)
    assert repair_cache(store, plan) == 0
    assert _damaged(without) == {}
    flip(without / LIST, 30)
    plan = plan_repair(store, verify_cache(store))
    assert plan.make == (KEY,)
    assert plan.remove == (LIST,)


def test_a_stage_that_ends_with_rows_quarantined_has_repaired(
    without: Path, made_without: Path
) -> None:
    store = Store(str(without))
    for name in (SHARD, PLAN):
        flip(without / name, 30)
    plan = plan_repair(store, verify_cache(store))
    assert repair_cache(store, plan, _run_by_hand(without, made_without)) == 0
    assert digests(without) == digests(made_without)
    # A repair that fails repairs nothing.
    flip(without / SHARD, 30)
    before = digests(without)
    plan = plan_repair(store, verify_cache(store))
    with pytest.raises(CacheError, match=r"could not compute what is missing .exit code 3"):
        repair_cache(store, plan, lambda _arguments: 3)
    kept = {name: d for name, d in digests(without).items() if not name.startswith("_meta/repair")}
    assert kept == before


def test_rows_that_are_answered_now_are_told(without: Path, tmp_path: Path) -> None:
    _write(str(tmp_path / "whole"), [])
    (without / LIST).unlink()
    store = Store(str(without))
    plan = plan_repair(store, verify_cache(store))
    assert plan.make == (KEY,)

    def run(_arguments: Sequence[str]) -> int:
        for name in (SHARD, "_meta/manifest.json"):
            shutil.copy(tmp_path / "whole" / name, without / name)
        shutil.rmtree(without / RECORDS)
        shutil.copytree(tmp_path / "whole" / RECORDS, without / RECORDS)
        return 0

    assert repair_cache(store, plan, run) == 1
    assert _damaged(without) == {}


def test_more_rows_quarantined_than_before_is_no_repair(without: Path, tmp_path: Path) -> None:
    _write(str(tmp_path / "limit"), [0, 1])
    flip(without / SHARD, 30)
    store = Store(str(without))
    plan = plan_repair(store, verify_cache(store))
    with pytest.raises(CacheError, match="its bytes differ from those before"):
        repair_cache(store, plan, _run_by_hand(without, tmp_path / "limit"))


def _part(source: Path, target: Path, *lost: tuple[str, int]) -> Path:
    shutil.copytree(source, target)
    lose(target, *lost)
    return target


def _merge(target: Path, *sources: Path) -> int:
    return main(["merge", *map(str, sources), str(target)])


def test_parts_keep_their_lists(without: Path, tmp_path: Path) -> None:
    one = _part(without, tmp_path / "one", ("train", 0))
    two = _part(without, tmp_path / "two", ("train", 1), ("heldout", 0))
    (two / LIST).unlink()
    assert _merge(tmp_path / "sum", one, two) == 0
    assert _damaged(tmp_path / "sum") == {}
    found, wanted = digests(tmp_path / "sum"), digests(without)
    differ = {name for name in wanted if found[name] != wanted[name]}
    assert differ <= {"README.md", "_meta/manifest.json"}
    manifest = read_manifest(Store(str(tmp_path / "sum")))
    assert manifest.corpus_counts["rows_quarantined"] == 1
    # The second time existing files are not written.
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "sum/data").rglob("*.parquet")}
    assert _merge(tmp_path / "sum", one, two) == 0
    assert times == {file: file.stat().st_mtime_ns for file in times}
    # A part without the list does not have the planned rows.
    (one / LIST).unlink()
    with pytest.raises(CacheError, match="no source has an intact train-00001"):
        _merge(tmp_path / "none", one, two)


def test_the_part_with_most_rows_is_taken(without: Path, tmp_path: Path) -> None:
    _write(str(tmp_path / "whole"), [])
    _write(str(tmp_path / "limit"), [0, 1])
    parts = [
        _part(folder, tmp_path / f"part-{folder.name}") for folder in (tmp_path / "limit", without)
    ]
    assert _merge(tmp_path / "sum", *parts) == 0
    assert read_inventory(Store(str(tmp_path / "sum"))).rows_quarantined == 1
    # Later a worker succeeds on all rows: the same target takes its shard and drops the list.
    assert _merge(tmp_path / "sum", *parts, tmp_path / "whole") == 0
    assert not (tmp_path / "sum" / LIST).exists()
    found, wanted = digests(tmp_path / "sum"), digests(tmp_path / "whole")
    assert {**found, "README.md": ""} == {**wanted, "README.md": ""}
    assert len(read_all(open_cache(str(tmp_path / "sum")))) == 10


def test_a_sum_of_teachers_and_a_slice_forget_the_plan(without: Path, tmp_path: Path) -> None:
    assert main(["slice", str(without), str(tmp_path / "a"), "--split", "train"]) == 0
    assert _damaged(tmp_path / "a") == {}
    other = tmp_path / "other"
    _write(str(other), [])
    for name in (PLAN, "_meta/config.yaml"):
        (other / name).unlink()
    assert main(["slice", str(other), str(tmp_path / "b"), "--split", "train"]) == 0
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "sum")]) == 0
    assert _damaged(tmp_path / "sum") == {}


def test_without_a_plan_a_list_still_counts(without: Path, tmp_path: Path) -> None:
    for name in (PLAN, "_meta/config.yaml"):
        (without / name).unlink()
    assert _damaged(without) == {}
    shutil.copytree(without, tmp_path / "two")
    assert _merge(tmp_path / "sum", without, tmp_path / "two") == 0
    assert _damaged(tmp_path / "sum") == {}
    assert (tmp_path / "sum" / LIST).read_bytes() == (without / LIST).read_bytes()


def test_the_list_of_another_shard_is_no_list(tmp_path: Path) -> None:
    """A copied file has a valid checksum, and names rows of another shard."""
    store = Store(str(tmp_path))
    assert quarantine_rows(store, "train-00001", [QuarantinedRow("0" * 32, "not finite", 3)])
    raw = store.read(quarantine_name("train-00001"))
    assert decode_quarantine(raw, "train-00001") is not None
    assert decode_quarantine(raw, "train-00002") is None
    store.write(quarantine_name("train-00002"), raw)
    assert read_quarantined_rows(store, "train-00002") == ()
    assert list(read_quarantine(store)) == ["train-00001"]


def test_where_the_rest_of_a_long_list_is() -> None:
    rows = tuple(QuarantinedRow(f"{number:032x}", "not finite", 3) for number in range(23))
    error = describe_quarantine(
        {"train-00000": rows},
        responses={"responses-00004": rows[:22]},
        planned_rows=100,
        url="memory://cache",
    )
    assert "... and 3 more in _meta/quarantine/\n" in error.found
    assert "... and 2 more in _meta/responses/, column `error`\n" in error.found
    assert error.do == (
        "--retry-quarantined tries those rows again; the shards are made from the responses as "
        "they are: another --cache_dir has those prompts tried again"
    )
