"""Copies of a cache on S3 (moto's server) on a local disk: read once, then not needed there."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cache.io.local_copies import LocalCopies
from pipeline.cache.io.reader import ShardDamaged, open_cache
from pipeline.storage import Store
from tests.unit.cache.sample_cache import read_all, write_cache
from tests.unit.storage import conftest as storage_fixtures

s3_endpoint = storage_fixtures.s3_endpoint
bucket = storage_fixtures.bucket


def _sample_ids(url: str, folder: Path) -> list[str]:
    cache = open_cache(url)
    cache.copies = LocalCopies(folder, 1 << 20)
    return [row.sample_id for row in read_all(cache)]


def test_read_once_from_s3(bucket: str, tmp_path: Path) -> None:
    url = f"s3://{bucket}/cache"
    write_cache(url)
    records = open_cache(url).records()
    first = _sample_ids(url, tmp_path)
    assert len(first) == sum(record.rows for record in records)
    assert {file.stem for file in tmp_path.iterdir()} == {r.xxh3_128 for r in records}
    for record in records:
        Store(url).delete(record.path)
    assert _sample_ids(url, tmp_path) == first
    # A copy that is damaged is no better than none: the shard itself is asked for, and named.
    (tmp_path / f"{records[0].xxh3_128}.shard").write_bytes(b"damaged")
    with pytest.raises(ShardDamaged, match=f"{url}/data/.*: shard damaged: missing"):
        _sample_ids(url, tmp_path)
