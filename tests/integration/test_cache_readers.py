"""Independent readers open a cache directly: datasets, DuckDB, polars, pyarrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache.codec.spec import COLUMNS
from pipeline.cache.io.reader import open_cache
from pipeline.sampling.quantisation import Quantisation
from tests.unit.cache.sample_cache import write_cache
from tests.unit.cache.sampled_cache import write_sampled_cache

NAMES = ["sample_id", "num_tokens", "num_loss_tokens", "input_ids", "loss_mask", *COLUMNS]


@pytest.fixture(scope="module", params=["top-k", "sampled"])
def cache_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readers") / "cache"
    (write_cache if request.param == "top-k" else write_sampled_cache)(str(folder))
    # The unfinished files of a killed writer must not disturb any reader.
    (folder / "data/train/00002.parquet.0123.partial").write_bytes(b"PAR1 half")
    return folder


@pytest.fixture(scope="module")
def expected(cache_dir: Path) -> dict[str, list[Any]]:
    cache = open_cache(str(cache_dir))
    return {
        split: [
            row
            for shard, rows in enumerate(cache.source(split).shard_rows())
            for row in cache.source(split).read_rows(shard, range(rows))
        ]
        for split in ("train", "heldout")
    }


def _same(found: list[dict[str, Any]], rows: list[Any]) -> None:
    assert len(found) == len(rows)
    for got, row in zip(found, rows, strict=True):
        targets = row.targets
        assert list(got) == NAMES
        assert got["sample_id"] == row.sample_id
        assert got["num_tokens"] == row.input_ids_L.size == len(got["input_ids"])
        assert got["num_loss_tokens"] == targets.num_positions == sum(got["loss_mask"])
        assert list(got["input_ids"]) == row.input_ids_L.tolist()
        assert list(got["loss_mask"]) == row.loss_mask_L.tolist()
        assert all(isinstance(got[name], bytes) for name in COLUMNS)
        assert len(got["label_logprob"]) == targets.num_positions
        levels = np.frombuffer(got["label_logprob"], np.uint8)
        assert (
            Quantisation().always_kept_values()[levels].tolist() == targets.label_logprob_N.tolist()
        )
        assert len(got["entropy"]) == targets.entropy_NG.size


def test_datasets(
    cache_dir: Path,
    expected: dict[str, list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    found = datasets.load_dataset(str(cache_dir), cache_dir=str(tmp_path))
    assert set(found) == {"train", "heldout"}
    for split, rows in expected.items():
        _same([dict(row) for row in found[split]], rows)
        assert found[split].features["label_logprob"].dtype == "binary"
        assert found[split].features["input_ids"].feature.dtype == "int32"


def test_duckdb(cache_dir: Path, expected: dict[str, list[Any]]) -> None:
    import duckdb

    for split, rows in expected.items():
        query = duckdb.sql(f"SELECT * FROM '{cache_dir}/data/{split}/*.parquet'")
        names = query.columns
        _same([dict(zip(names, row, strict=True)) for row in query.fetchall()], rows)
    [(total,)] = duckdb.sql(
        f"SELECT sum(num_loss_tokens) FROM '{cache_dir}/data/**/*.parquet'"
    ).fetchall()
    assert total == sum(record.loss_tokens for record in open_cache(str(cache_dir)).records())


def test_polars(cache_dir: Path, expected: dict[str, list[Any]]) -> None:
    import polars

    for split, rows in expected.items():
        frame = polars.read_parquet(f"{cache_dir}/data/{split}/*.parquet")
        _same(frame.to_dicts(), rows)


def test_pyarrow(cache_dir: Path, expected: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    for split, rows in expected.items():
        files = sorted((cache_dir / "data" / split).glob("*.parquet"))
        table = ds.dataset(files).to_table()
        _same(table.to_pylist(), rows)
        assert table.schema.field("log_z").type == pa.binary()
        assert not any(table.schema.field(name).nullable for name in NAMES)
        # Page checksums detect damage as well.
        file = pq.ParquetFile(files[0], page_checksum_verification=True)
        assert file.read().num_rows == file.metadata.num_rows
        column = file.metadata.row_group(0).column(NAMES.index("always_kept_values"))
        assert column.compression == "ZSTD"
        assert "RLE_DICTIONARY" not in column.encodings
