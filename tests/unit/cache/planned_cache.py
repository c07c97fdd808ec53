"""A small cache with a configuration and a plan: a derived cache's, or stage one's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pipeline.cache.layout.inventory import Plan, PlannedRows, encode_plan
from pipeline.cache.layout.names import (
    PLAN,
    RECORDS,
    parse_segment,
    record_name,
    segment_name,
    shard_name,
)
from pipeline.cache.layout.records import decode_segment, encode_record
from pipeline.config import fingerprint
from pipeline.storage import Store
from pipeline.teacher.capture.plan import complete_plan, settle_plan
from tests.unit.cache.sample_cache import SIZES, sample_identity, sample_rows, write_cache

SEGMENT = segment_name("train", 0, 1)
"""The records of the training shards of `write_cache`."""


def sample_plan() -> Plan:
    """Return the plan of the shards of `write_cache`."""
    shards = []
    for split, index, number in SIZES:
        rows, _ = sample_rows(number, seed=100 * (split == "heldout") + index)
        tokens = sum(int(row.input_ids_L.size) for row in rows)
        names = fingerprint([row.sample_id for row in rows])
        shards.append(PlannedRows(split, index, number, tokens, names))
    return Plan(sample_identity(), tuple(shards))


def write_planned_cache(url: str) -> None:
    """Write a complete cache of three shards and ten rows; its plan lists them."""
    write_cache(url)
    store = Store(url)
    store.write(PLAN, encode_plan(sample_plan()))
    store.write("_meta/config.yaml", b"teacher: {}\n")


def plan_as_stage_one(folder: Path, *, is_known: bool = True) -> None:
    """Replace the plan by stage one's: numbers of shards, and not even these before `is_known`."""
    store = Store(str(folder))
    store.delete(PLAN)
    settle_plan(store, sample_identity())
    if is_known:
        complete_plan(store, sample_identity(), Counter(split for split, _, _ in SIZES))


def lose(folder: Path, *shards: tuple[str, int]) -> None:
    """Make an unfinished cache of a complete one, without these shards and with single records."""
    store = Store(str(folder))
    for file in store.list(RECORDS):
        name = parse_segment(file)
        assert name is not None
        records = decode_segment(store.read(name.path), name)
        assert records is not None
        store.delete(name.path)
        for record in records:
            store.write(record_name(*record.key), encode_record(record))
    for name in ("_meta/manifest.json", "README.md"):
        store.delete(name)
    for key in shards:
        store.delete(shard_name(*key))
        store.delete(record_name(*key))


def flip(file: Path, at: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(bytes(data))
