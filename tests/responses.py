"""What a cache over the teacher's own responses holds, for the tests that compare it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.cache.io.reader import open_cache
from tests.conftest import digests

RESPONSES = "_meta/responses"


def content_digests(folder: Path) -> dict[str, str]:
    """Return the digests of a cache; the folder's own name stands in two texts."""
    found = digests(folder)
    for name in ("README.md", "_meta/config.yaml"):
        found.pop(name, None)
    return found


def response_rows(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted((folder / RESPONSES).glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return {row["response_id"]: row for row in rows}


def cached_rows(folder: Path) -> dict[str, Any]:
    cache = open_cache(str(folder))
    return {
        row.sample_id: row
        for split in ("train", "heldout")
        for shard, rows in enumerate(cache.source(split).shard_rows())
        for row in cache.source(split).read_rows(shard, range(rows))
    }
