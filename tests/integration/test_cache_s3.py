"""A cache on S3 (moto's server): written, read, verified, damaged, without a local copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cache.__main__ import main as cache_command
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.writer import commit_shard
from pipeline.cache.layout.fold import reopen
from pipeline.errors import CacheError, run_command
from pipeline.storage import Store
from tests.unit.cache.records import intact_record
from tests.unit.cache.sample_cache import sample_shard, write_cache
from tests.unit.storage import conftest as storage_fixtures

s3_endpoint = storage_fixtures.s3_endpoint
bucket = storage_fixtures.bucket


def _verify(url: str) -> int:
    return run_command(lambda: cache_command(["verify", url]))


def test_a_cache_on_s3_is_the_same_as_on_disk(bucket: str, tmp_path: Path) -> None:
    url, local = f"s3://{bucket}/runs/cache", f"{tmp_path}/cache"
    assert write_cache(url) == write_cache(local)
    remote, disk = open_cache(url), open_cache(local)
    assert remote.manifest == disk.manifest
    for split in ("train", "heldout"):
        a, b = remote.source(split), disk.source(split)
        for shard, rows in enumerate(a.shard_rows()):
            for x, y in zip(
                a.read_rows(shard, range(rows)), b.read_rows(shard, range(rows)), strict=True
            ):
                assert x.sample_id == y.sample_id
                assert x.targets.logprobs_E.tolist() == y.targets.logprobs_E.tolist()
    for record in disk.records():
        assert Store(url).read(record.path) == Store(local).read(record.path)
    assert remote.tokenizer_files() == disk.tokenizer_files()


def test_damage_on_s3_is_found_and_mended(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"s3://{bucket}/cache"
    write_cache(url)
    assert _verify(url) == 0
    store, (record, data) = Store(url), sample_shard("train", 1, 3)
    store.write(record.path, data[:-1] + b"\x00")
    with pytest.raises(CacheError, match=f"{url}/{record.path}: shard damaged: checksum"):
        open_cache(url).source("train").read_rows(1, [0])
    capsys.readouterr()
    assert _verify(url) == 3
    out, err = capsys.readouterr()
    assert record.path in out
    assert err.count("\n") == 1
    assert reopen(store, [("train", 1)]) == (("train", 1),)
    assert store.list("_meta/shards") == ["heldout-00000.parquet", "train-00000.parquet"]
    commit_shard(store, record, data)
    assert intact_record(store, "train", 1, check_bytes=True) == record
    assert store.sizes("data/train")["00001.parquet"] == len(data)
    with pytest.raises(CacheError, match="no cache there"):
        open_cache(url)
