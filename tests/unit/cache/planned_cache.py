"""A small cache as stage one writes it: with a plan and a configuration."""

from __future__ import annotations

from pathlib import Path

from pipeline.cache.layout.inventory import Plan, PlannedRows, encode_plan
from pipeline.cache.layout.manifest import PLAN
from pipeline.config import fingerprint
from pipeline.storage import Store
from tests.unit.cache.sample_cache import SIZES, sample_identity, sample_rows, write_cache


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
    """Write a complete cache of three shards and ten rows."""
    write_cache(url)
    store = Store(url)
    store.write(PLAN, encode_plan(sample_plan()))
    store.write("_meta/config.yaml", b"teacher: {}\n")


def flip(file: Path, at: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(bytes(data))
