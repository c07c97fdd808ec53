"""What the records cost at 200,000 shards: requests of end and restart, the time of a merge.

    python -m tests.bench.scale_records [--shards 200000]

The shards are made up, in memory: requests are counted, and no network's time is in them.
Ends with the figures `finalize_requests`, `restart_requests` and `merge_growth`, the time of a
merge of four times as many shards over that of as many, by four: 1 is linear.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from pipeline.cache.io.row_index import open_row_index
from pipeline.cache.layout.fold import blocks
from pipeline.cache.layout.manifest import read_manifest
from pipeline.cache.layout.names import record_name, shard_name
from pipeline.cache.layout.records import encode_record, encode_segment
from pipeline.cache.tools.merge import merge_caches
from pipeline.corpus.prepared.summary import SampleTotals
from pipeline.observe.shares import Shares
from pipeline.progress import Progress
from pipeline.storage import Store
from pipeline.teacher.capture.complete import complete_cache
from pipeline.teacher.capture.plan import PlannedShard, complete_plan, settle_plan
from pipeline.teacher.capture.pool import ShardPool
from pipeline.teacher.fleet.leases import LeaseBoard
from tests.bench.flat_memory import register
from tests.unit.cache.records import counted, finalize_made_up, made_up_data, made_up_record
from tests.unit.cache.sample_cache import sample_identity

SHARDS = 200_000
HELDOUT = 100
"""One shard in so many."""
_numbers = itertools.count()


def made_up(shards: int, *, single: int = 0) -> tuple[str, dict[str, int]]:
    """Write the shards and records of a cache that only lacks its end; return where, and how many.

    Args:
        shards: of both splits.
        single: so many of the last training shards have records of their own, the others are in
            segments, as stage one leaves them.
    """
    register()
    url = f"flat://scale-{next(_numbers)}/cache"
    store = Store(url)
    heldout = max(1, shards // HELDOUT)
    counts = {"train": shards - heldout, "heldout": heldout}
    for block in blocks(counts):
        records = [made_up_record(block.split, index) for index in block.shards]
        folded = block.split != "train" or block.last < counts["train"] - single
        if folded:
            _put(store, block.path, encode_segment(records))
        for record in records:
            _put(store, record.path, made_up_data(*record.key))
            if not folded:
                _put(store, record_name(*record.key), encode_record(record))
    return url, counts


def _put(store: Store, name: str, data: bytes) -> None:
    store._fs.pipe_file(store.path(name), data)


def finalize_cost(shards: int = SHARDS, *, single: int = 320) -> dict[str, Any]:
    """Return the requests and seconds of finishing a cache, and the size of its manifest."""
    url, counts = made_up(shards, single=single)
    store, requests = counted(url)
    begun = time.monotonic()
    finalize_made_up(store, counts)
    took = time.monotonic() - begun
    result = {
        "shards": shards,
        "requests": len(requests.requests),
        "by_kind": dict(Counter(requests.requests)),
        "seconds": took,
        "manifest_bytes": len(store.read("_meta/manifest.json")),
    }
    _forget(store)
    return result


class _Source:
    """The shards of a corpus that is prepared; their text is never asked for."""

    is_complete, num_tokens, source_xxh3_128 = True, 7, ""

    def __init__(self, counts: Mapping[str, int]) -> None:
        """Know all shards."""
        self.shards: Any = [
            PlannedShard(split, index, self)  # type: ignore[arg-type]
            for split, count in counts.items()
            for index in range(count)
        ]

    def refresh(self) -> None:
        """Nothing more comes."""

    def projected(self) -> SampleTotals:
        """Return the sums."""
        return SampleTotals(len(self.shards), 7 * len(self.shards), 3 * len(self.shards))


def restart_cost(shards: int = SHARDS, *, single: int = 320) -> dict[str, Any]:
    """Return the requests of stage one's start: over a complete cache, and one that lacks its end.

    Over the latter it goes on with `finalize`, whose requests `finalize_cost` counts.
    """
    url, counts = made_up(shards, single=single)
    identity, source = sample_identity(), _Source(counts)
    settle_plan(Store(url), identity)
    complete_plan(Store(url), identity, counts)
    store, requests = counted(url)
    assert complete_cache(store, identity, checksums=False) is None
    settle_plan(store, identity)
    with Progress(enabled=False) as progress:
        pool = ShardPool(
            source,  # type: ignore[arg-type]
            LeaseBoard(store, "a measurement", 60.0),
            progress,
            Shares(),
            on_complete=lambda: complete_plan(store, identity, counts),
        )
        assert pool.missing() == []
    unfinished = len(requests.requests)
    finalize_made_up(Store(url), counts)
    requests.requests.clear()
    manifest = complete_cache(store, identity, checksums=False)
    assert manifest is not None
    assert manifest.shard_counts == counts
    complete = len(requests.requests)
    requests.requests.clear()
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, XDG_CACHE_HOME=folder):
        lines = open_row_index(store, read_manifest(store)).lines("train")
        assert lines[-1].path == shard_name("train", counts["train"] - 1)
    result = {
        "shards": shards,
        "complete": complete,
        "unfinished": unfinished,
        "open_with_row_lengths": len(requests.requests),
    }
    _forget(store)
    return result


def merge_cost(shards: int) -> dict[str, Any]:
    """Return the seconds of joining two caches of half as many shards each."""
    urls = []
    for part in range(2):
        url, counts = made_up(shards // 2)
        teacher = {**sample_identity()["teacher"], "model": f"teacher {part}"}
        finalize_made_up(Store(url), counts, identity=sample_identity(teacher=teacher))
        urls.append(url)
    target = Store(f"flat://scale-{next(_numbers)}/sum")
    begun = time.monotonic()
    rows = merge_caches(target, urls, command="a measurement")
    took = time.monotonic() - begun
    assert rows == 2 * (shards // 2 * 2)
    for store in (target, *map(Store, urls)):
        _forget(store)
    return {"shards": shards, "seconds": took}


def merge_growth(shards: int) -> float:
    """Return by how much a shard's time grows when there are four times as many; 1 is linear."""
    merge_cost(shards // 4)  # what is imported and compiled at first use
    few, many = merge_cost(shards // 4), merge_cost(shards)
    return float(many["seconds"] / few["seconds"] / 4)


def figures() -> dict[str, float]:
    """Return the figures of `make bench-scale`: a restart is a look and the end of the cache."""
    end, restart = finalize_cost(), restart_cost()
    return {
        "restart_requests_200k": end["requests"] + restart["unfinished"],
        "complete_cache_requests": restart["complete"],
    }


def _forget(store: Store) -> None:
    store._fs.rm(store.root, recursive=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=SHARDS)
    shards = parser.parse_args().shards
    end, restart = finalize_cost(shards), restart_cost(shards)
    print(
        f"finishing {shards} recorded shards: {end['requests']} requests {end['by_kind']}, "
        f"{end['seconds']:.1f} s; the manifest is {end['manifest_bytes']} bytes"
    )
    print(
        f"a restart: {restart['complete']} requests over the complete cache, "
        f"{restart['unfinished']} over one that lacks its end; a reader opens it and has all row "
        f"lengths after {restart['open_with_row_lengths']}"
    )
    growth = merge_growth(max(8, shards // 4))
    print(f"merge: a shard of {shards // 4} takes {growth:.2f} times as long as one of a quarter")
    print(f"FIGURE finalize_requests {end['requests']}")
    print(f"FIGURE restart_requests {restart['complete']}")
    print(f"FIGURE merge_growth {growth:.2f}")


if __name__ == "__main__":
    main()
