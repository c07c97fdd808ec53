"""Units: any division of a source gives the same rows, and reads no more than it must."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.prepared.units import Unit, cut_units, rows_of
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.sources.registry import open_source
from pipeline.corpus.sources.rows import RowSource

NUMBER = 70
ROWS = [{"text": f"row {n} " + "é" * (n * 7 % 50)} for n in range(NUMBER)]


def _write(folder: Path, kind: str) -> RowSource:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS]
    lines[30:30] = [b"\n", b"  \n", b"\xc2\xa0\n"]  # blank, and blank in Unicode: no rows
    match kind:
        case "jsonl":
            (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(lines[:50]))
            (folder / "b.jsonl").write_bytes(b"".join(lines[50:]).rstrip(b"\n"))
        case "gz":
            (folder / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
        case "parquet":
            for name, rows in (("a", ROWS[:40]), ("b", ROWS[40:])):
                pq.write_table(
                    pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=7
                )
        case "csv":
            text = "".join(f'"{row["text"]}"\n' for row in ROWS)
            (folder / "a.csv").write_text("text\n" + text, encoding="utf-8")
        case "saved":
            import datasets

            datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    return open_source(CorpusSettings(dataset_name=str(folder)))


@pytest.fixture(scope="module", params=["jsonl", "gz", "parquet", "csv", "saved"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RowSource:
    return _write(tmp_path_factory.mktemp("source") / request.param, request.param)


def _read(source: RowSource, units: tuple[Unit, ...]) -> list[tuple[str, Any]]:
    return [(row.key, row.data["text"]) for unit in units for row in rows_of(source, unit)]


@given(unit_bytes=st.integers(1, 6000), num_samples=st.none() | st.integers(1, NUMBER + 5))
@settings(max_examples=60, deadline=None)
def test_any_division_gives_the_same_rows(
    source: RowSource, unit_bytes: int, num_samples: int | None
) -> None:
    whole = _read(source, cut_units(source, unit_bytes=1 << 40, num_samples=None))
    assert [text for _, text in whole] == [row["text"] for row in ROWS]
    assert len({key for key, _ in whole}) == NUMBER
    units = cut_units(source, unit_bytes=unit_bytes, num_samples=num_samples)
    assert _read(source, units) == whole[:num_samples]
    assert [unit.index for unit in units] == list(range(len(units)))
    again = tuple(Unit.from_json(u.index, json.loads(json.dumps(u.to_json()))) for u in units)
    assert again == units
    for unit in units:
        rows = len(list(rows_of(source, unit)))
        assert unit.rows in (None, rows)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_large_files_are_divided(kind: str, tmp_path: Path) -> None:
    source = _write(tmp_path / kind, kind)
    units = cut_units(source, unit_bytes=500, num_samples=None)
    assert len(units) > 4
    assert all(unit.size < 1500 for unit in units)


def test_a_source_can_be_sent_to_another_process(source: RowSource) -> None:
    units = cut_units(source, unit_bytes=999, num_samples=None)
    there: RowSource = pickle.loads(pickle.dumps(source))
    assert _read(there, units) == _read(source, units)
    assert there.name == source.name


def test_what_is_after_the_last_row_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _write(tmp_path / "jsonl", "jsonl")
    units = cut_units(source, unit_bytes=400, num_samples=9)
    assert len(units) < 4
    # Nor is anything counted where one unit holds all rows in any case.
    monkeypatch.setattr(type(source), "count", lambda *_: pytest.fail("counted"))
    assert len(cut_units(source, unit_bytes=1 << 30, num_samples=9)) == 1


def test_tiny_files_share_a_unit(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02d}.txt").write_text(f"text {number}")
    source = open_source(CorpusSettings(dataset_name=str(tmp_path)))
    units = cut_units(source, unit_bytes=70, num_samples=None)
    assert 2 < len(units) < 10
    assert len(_read(source, units)) == 30


def test_a_line_in_the_middle_of_a_file_is_named_by_its_byte(
    tmp_path: Path, build: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    good = json.dumps({"text": "what does it do"}) + "\n"
    path = tmp_path / "a.jsonl"
    path.write_text(good * 40 + "{broken\n" + good * 9)
    assert build(path, unit_mib=0.0003).counts.quarantined == 1
    at = 40 * len(good)
    assert f"a.jsonl, byte {at}" in caplog.text
    assert path.read_bytes()[at : at + 7] == b"{broken"
