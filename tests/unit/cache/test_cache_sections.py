"""A bit flipped or bytes replaced in any section of a shard: every reader detects it."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.tables import read_shard
from pipeline.cache.layout.schema import column_names
from pipeline.cache.tools.verify import verify_cache
from pipeline.errors import CacheError
from pipeline.storage import Store
from tests.unit.cache.planned_cache import flip
from tests.unit.cache.sample_cache import SHARD

ONE = "data/train/00000.parquet"


def _places(file: Path) -> dict[str, int]:
    data, group = file.read_bytes(), pq.ParquetFile(file).metadata.row_group(0)
    chunks = [group.column(at) for at in range(len(column_names()))]
    places = {"page header": chunks[5].data_page_offset + 2}
    places["identity in the footer"] = data.rindex(b"identity_digest") + 30
    for name, chunk in zip(column_names(), chunks, strict=True):
        places[f"column {name}"] = chunk.data_page_offset + chunk.total_compressed_size - 1
    return places


def _found_by_both(folder: Path, damaged: set[int]) -> None:
    source = open_cache(str(folder)).source("train")
    for shard in (0, 1):
        if shard in damaged:
            with pytest.raises(CacheError, match=f"train/0000{shard}.parquet: shard damaged: "):
                source.read_rows(shard, [0])
        else:
            assert source.read_rows(shard, [0])
    names = {finding.name for finding in verify_cache(Store(str(folder)))}
    assert names == {f"data/train/0000{shard}.parquet" for shard in damaged}


def test_a_bit_in_every_section(cache_dir: Path) -> None:
    file = cache_dir / SHARD
    whole = file.read_bytes()
    for at in _places(file).values():
        file.write_bytes(whole)
        flip(file, at)
        _found_by_both(cache_dir, {1})


def test_one_bit_of_every_byte(cache_dir: Path) -> None:
    store = Store(str(cache_dir))
    record = open_cache(store.url).records("train")[1]
    file = cache_dir / record.path
    for at in range(record.bytes):
        flip(file, at, at % 8)
        with pytest.raises(CacheError, match="checksum"):
            read_shard(store, record)
        flip(file, at, at % 8)
    assert read_shard(store, record)


@pytest.mark.parametrize("kind", ["cut by a byte", "cut in half", "empty", "longer", "missing"])
def test_a_file_of_another_length(kind: str, cache_dir: Path) -> None:
    file = cache_dir / SHARD
    data = file.read_bytes()
    file.unlink()
    changed = {
        "cut by a byte": data[:-1], "cut in half": data[: len(data) // 2], "empty": b"",
        "longer": data + b"x",
    }  # fmt: skip
    if kind in changed:
        file.write_bytes(changed[kind])
    _found_by_both(cache_dir, {1})


def test_two_whole_shards_in_each_others_place(cache_dir: Path) -> None:
    one, two = (cache_dir / name for name in (ONE, SHARD))
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    _found_by_both(cache_dir, {0, 1})
