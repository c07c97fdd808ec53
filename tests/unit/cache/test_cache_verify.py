"""`verify` names every damaged file of a cache, and no other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.io.writer import commit_shard, encode_shard
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.inventory import encode_plan
from pipeline.cache.layout.names import CHECKS, PLAN, SegmentName, record_name, shard_name
from pipeline.cache.layout.records import decode_segment, encode_segment
from pipeline.cache.tools.checking.rebuild import record_of
from pipeline.cache.tools.verify import verify_cache
from pipeline.config import fingerprint
from pipeline.errors import CacheError, run_command
from pipeline.storage import Store
from tests.unit.cache.planned_cache import (
    SEGMENT,
    flip,
    lose,
    plan_as_stage_one,
    sample_plan,
    write_planned_cache,
)
from tests.unit.cache.sample_cache import (
    SHARD,
    SPEC,
    TEMPERATURES,
    finish,
    forge,
    rewrite_manifest,
    sample_identity,
    sample_rows,
    sample_shard,
)

META = [
    "_meta/manifest.json",
    PLAN,
    "_meta/tokenizer/tokenizer.json",
    SEGMENT,
]
FILES = [*META, SHARD]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "cache"
    write_planned_cache(str(folder))
    return folder


@pytest.fixture
def planned(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def _damaged(folder: Path, *, check: str = "decode", workers: int = 2) -> set[str]:
    return {f.name for f in verify_cache(Store(str(folder)), check=check, workers=workers)}


def test_a_whole_cache_has_no_findings(whole: Path) -> None:
    for workers in (1, 3):
        for check in CHECKS:
            assert _damaged(whole, check=check, workers=workers) == set()


def test_progress_counts_every_row_once(whole: Path) -> None:
    totals: list[int] = []
    rows: list[int] = []
    verify_cache(Store(str(whole)), workers=2, on_start=totals.append, on_rows=rows.append)
    assert totals == [10]
    assert sum(rows) == 10


@pytest.mark.parametrize("is_known", [True, False])
def test_a_plan_of_stage_one_has_no_more_than_numbers(
    is_known: bool, planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_as_stage_one(planned, is_known=is_known)
    if is_known:
        assert _damaged(planned) == set()
    lose(planned, ("train", 1))
    totals: list[int] = []
    rows: list[int] = []
    findings = verify_cache(Store(str(planned)), on_start=totals.append, on_rows=rows.append)
    unwritten = {record_name("train", 1)} if is_known else set()
    assert {finding.name for finding in findings} == {"_meta/manifest.json", *unwritten}
    assert totals == [7]
    assert sum(rows) == 7
    assert main(["inspect", str(planned)]) == 0
    state = next(line for line in capsys.readouterr().out.splitlines() if "incomplete" in line)
    made = "2 of 3 shards" if is_known else "2 shards so far"
    assert state == f"state        incomplete: {made}; its cache-teacher command continues it"
    assert main(["inspect", str(planned), "--json"]) == 0
    train = json.loads(capsys.readouterr().out)["splits"]["train"]
    assert (train["shards"], train["shards_planned"]) == (1, 2 if is_known else None)
    assert train["tokens_planned"] is None


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found_and_named(name: str, planned: Path) -> None:
    file = planned / name
    before = file.read_bytes()
    rng = np.random.default_rng(len(before))
    places = rng.choice(len(before), min(len(before), 60), replace=False).tolist()
    for at in [0, len(before) - 1, *places]:
        file.write_bytes(before)
        flip(file, at, int(rng.integers(8)))
        found = _damaged(planned)
        if not found:  # only a change without meaning in JSON: 1e-05 and 1E-05
            assert file.suffix == ".json"
            assert json.loads(file.read_bytes()) == json.loads(before)
            assert name != PLAN  # stage one compares the plan's bytes
            continue
        assert name in found, at
        # A lost manifest affects no other file, and a plan is checked against the shards.
        assert found == {name}, at


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["cut", "empty", "deleted", "longer"])
def test_cut_emptied_and_deleted_files_are_found(name: str, kind: str, planned: Path) -> None:
    file = planned / name
    data = file.read_bytes()
    file.unlink()
    if kind != "deleted":
        file.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "longer": data + b"x"}[kind])
    assert _damaged(planned) == {name}
    assert _damaged(planned, check="checksum") == {name}
    assert _damaged(planned, check="size") == {name}


def test_every_damaged_file_is_listed_at_once(
    planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in FILES:
        flip(planned / name, (planned / name).stat().st_size // 2)
    (planned / "data/heldout/00000.parquet").unlink()
    assert run_command(lambda: main(["verify", str(planned), "--workers", "3"])) == 3
    out, err = capsys.readouterr()
    for name in (SHARD, PLAN, "_meta/manifest.json", "data/heldout/00000.parquet"):
        assert f"{planned}/{name}: " in out
    assert err.count("\n") == 1
    assert "repair" in err


def test_what_each_level_sees(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for check, says in (("size", "sizes only"), ("decode", "every row decoded")):
        assert main(["verify", str(planned), "--check", check]) == 0
        assert says in capsys.readouterr().out
    flip(planned / SHARD, 40)
    assert _damaged(planned, check="size") == set()
    assert _damaged(planned, check="checksum") == {SHARD}
    assert _damaged(planned, check="decode") == {SHARD}


def test_two_swapped_shards_are_both_found(planned: Path) -> None:
    one, two = planned / shard_name("train", 0), planned / SHARD
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    assert _damaged(planned) == {shard_name("train", 0), SHARD}
    assert _damaged(planned, check="size") == {shard_name("train", 0), SHARD}
    # Their records swapped as well: the files are those of the records, and in the wrong place.
    name = SegmentName("train", 0, 1)
    records = decode_segment((planned / SEGMENT).read_bytes(), name)
    assert records is not None
    turned = [records[1].moved("train", 0), records[0].moved("train", 1)]
    (planned / SEGMENT).write_bytes(encode_segment(turned))
    assert _damaged(planned) == {SEGMENT}
    (planned / "_meta/manifest.json").unlink()
    assert _damaged(planned) == {"_meta/manifest.json", PLAN}


def test_without_a_manifest_the_records_judge(planned: Path) -> None:
    (planned / "_meta/manifest.json").unlink()
    assert _damaged(planned) == {"_meta/manifest.json"}
    flip(planned / SHARD, 40)
    (planned / record_name("heldout", 0)).unlink()
    assert _damaged(planned, check="size") == {"_meta/manifest.json", record_name("heldout", 0)}
    assert _damaged(planned) == {"_meta/manifest.json", SHARD, record_name("heldout", 0)}
    (planned / PLAN).unlink()
    found = _damaged(planned)
    assert {"_meta/manifest.json", SHARD, PLAN, "data/heldout/00000.parquet"} == found


def test_files_that_belong_to_no_shard(planned: Path) -> None:
    shutil.copy(planned / SHARD, planned / "data/train/00007.parquet")
    shutil.copy(planned / SEGMENT, planned / record_name("train", 7))
    (planned / "data/train/00003.parquet.0123.partial").write_bytes(b"PAR1 half")
    findings = verify_cache(Store(str(planned)))
    assert {f.name for f in findings} == {"data/train/00007.parquet", record_name("train", 7)}
    assert all(f.stray for f in findings)


def test_a_plan_of_other_samples_or_shards_is_found(planned: Path) -> None:
    plan = sample_plan()
    first, *rest = plan.shards
    for shards, says in (
        ((replace(first, samples_sha256="0" * 64), *rest), "plans other samples"),
        ((replace(first, rows=first.rows + 1), *rest), "plans 6 rows"),
        (tuple(rest), "plans 2 shards, the manifest lists 3"),
        ((first, first, *rest), "plans 4 shards"),
    ):
        (planned / PLAN).write_bytes(encode_plan(replace(plan, shards=shards)))
        (finding,) = verify_cache(Store(str(planned)))
        assert finding.name == PLAN
        assert says in finding.reason
    other = replace(plan, identity=sample_identity(shard_tokens=33))
    (planned / PLAN).write_bytes(encode_plan(other))
    (finding,) = verify_cache(Store(str(planned)))
    assert "another identity" in finding.reason


def _write_rows(folder: Path, splits: dict[str, list[list[int]]]) -> None:
    """Write a cache whose shards hold the rows of these seeds."""
    store, records = Store(str(folder)), []
    for split in ("train", "heldout"):
        for index, seeds in enumerate(splits.get(split, [])):
            made = [sample_rows(1, seed=seed) for seed in seeds]
            record, data = encode_shard(
                [rows[0] for rows, _ in made],
                SPEC,
                split=split,
                index=index,
                temperatures=TEMPERATURES,
                identity_digest=fingerprint(sample_identity()),
                tails=[tails[0] for _, tails in made],
            )
            commit_shard(store, record, data)
            records.append(record)
    finish(store, records, sample_identity())


def test_a_sample_stands_in_the_cache_once_and_in_one_split(tmp_path: Path) -> None:
    _write_rows(tmp_path / "a", {"train": [[1, 2], [3, 4]], "heldout": [[5]]})
    assert _damaged(tmp_path / "a") == set()
    _write_rows(tmp_path / "b", {"train": [[1, 2], [3, 2]], "heldout": [[5]]})
    (finding,) = verify_cache(Store(str(tmp_path / "b")))
    assert finding.name == SHARD
    assert "1 of its samples are in the cache twice" in finding.reason
    _write_rows(tmp_path / "c", {"train": [[1, 2], [3, 4]], "heldout": [[4, 5, 1]]})
    (finding,) = verify_cache(Store(str(tmp_path / "c")))
    assert finding.name == "data/heldout/00000.parquet"
    assert "2 of its samples are in the other split" in finding.reason


def test_counts_that_agree_everywhere_but_in_the_rows(planned: Path) -> None:
    """Checksums, manifest and record are right: only decoding finds that an entry is missing."""
    file = planned / SHARD
    record, data = sample_shard("train", 1, 3)
    table = pq.read_table(file)
    pq.write_table(table.slice(0, 2), file)
    data = file.read_bytes()
    forge(planned, replace(record, bytes=len(data), xxh3_128=checksum(data)))
    assert _damaged(planned, check="checksum") == set()
    (finding,) = verify_cache(Store(str(planned)), check="decode")
    assert finding.name == SHARD
    assert "its record says" in finding.reason


def test_json_for_programs(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: main(["verify", str(planned), "--json"])) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"url": str(planned), "intact": True, "damaged": []}
    flip(planned / SHARD, 40)
    assert run_command(lambda: main(["verify", str(planned), "--json"])) == 3
    told = json.loads(capsys.readouterr().out)
    assert [item["file"] for item in told["damaged"]] == [f"{planned}/{SHARD}"]
    assert told["damaged"][0]["reason"].startswith("checksum ")


def test_a_shard_says_what_its_record_cannot_learn_from_its_rows() -> None:
    rows, tails = sample_rows(3, seed=5)
    digest = fingerprint(sample_identity())
    cases: tuple[dict[str, Any], ...] = (
        {},
        {"source_xxh3_128": checksum(b"units"), "rows_quarantined": 2},
    )
    for known in cases:
        record, data = encode_shard(
            rows, SPEC, split="train", index=7, temperatures=TEMPERATURES,
            identity_digest=digest, tails=tails, **known,
        )  # fmt: skip
        assert record.rows_quarantined == known.get("rows_quarantined", 0)
        assert record_of(data, "train", 7, digest) == record
        assert record_of(data, "train", 7, "0" * 64) is None


def test_no_cache_and_a_newer_one(planned: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no cache there"):
        verify_cache(Store(str(tmp_path / "nothing")))
    rewrite_manifest(planned, format_version=9)
    with pytest.raises(CacheError, match="format version 9"):
        verify_cache(Store(str(planned)))


def test_inspect_says_how_far_an_unfinished_cache_is(
    planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(planned), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["complete"] is True
    assert told["scheme"]["name"] == "top-k"
    assert told["splits"]["train"]["sequences"] == 8
    lose(planned, ("train", 1))
    assert main(["inspect", str(planned)]) == 0
    out = capsys.readouterr().out
    assert "incomplete: 2 of 3 shards" in out
    assert "top-k, top_k 6" in out
    (planned / PLAN).write_bytes(b"{}")
    with pytest.raises(CacheError, match=r"plan.json .*missing or damaged"):
        main(["inspect", str(planned)])


def test_inspect_names_a_scheme_without_top_k(
    planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme = {"name": "threshold", "temperatures": [1.0, 2.0], "taus": [1 / 12, 0.04]}
    identity = sample_identity(scheme=scheme)
    rewrite_manifest(planned, identity=identity, identity_digest=fingerprint(identity))
    assert main(["inspect", str(planned)]) == 0
    assert "threshold, taus 0.08333/0.04" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["row_tokens", "row_loss_tokens"])
def test_a_record_with_the_right_sums_and_other_rows_is_found(column: str, planned: Path) -> None:
    """Training is planned by them."""
    record, _ = sample_shard("train", 1, 3)
    numbers = list(getattr(record, column))
    turned = numbers[1:] + numbers[:1]
    assert turned != numbers
    forge(planned, replace(record, **{column: tuple(turned)}))
    found = {f.name: f.reason for f in verify_cache(Store(str(planned)), check="decode")}
    assert found == {SHARD: "its rows have other lengths than its record says"}


def test_a_record_with_other_samples_is_found(planned: Path) -> None:
    """Rows are chosen by them, and repeats are found."""
    record, _ = sample_shard("train", 1, 3)
    forge(planned, replace(record, row_ids=record.row_ids[16:] + record.row_ids[:16]))
    found = {f.name: f.reason for f in verify_cache(Store(str(planned)), check="decode")}
    assert found[SHARD] == "its rows have other sample ids than its record says"
    assert set(found) == {SHARD, PLAN}
