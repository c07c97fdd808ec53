"""Rows of the plan that the teacher could not answer: which, why, and after how many tries.

A shard with such rows is made as if the plan did not hold them. The list of a shard lies in
`_meta/failed/SPLIT-NNNNN.json` and is written, once, before the shard's record; the rows of the
record and those of the list are together the rows of the plan, or the shard is made again. There
is no such file where every row was answered.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass

from pipeline.cache.layout.manifest import MANIFEST, record_name
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = [
    "FAILED",
    "FailedRow",
    "decode_failed",
    "describe_set_aside",
    "failed_name",
    "forget_failures",
    "read_failed",
    "read_failures",
    "set_aside",
]

FAILED = "_meta/failed"
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class FailedRow:
    """One row that is not in its shard."""

    sample_id: str
    error: str
    tries: int


def failed_name(shard: str) -> str:
    """Return the path of the list of a shard such as `train-00000`."""
    return f"{FAILED}/{shard}.json"


def set_aside(store: Store, shard: str, rows: Collection[FailedRow]) -> bool:
    """Write a shard's list unless another worker has written one; return whether it was written."""
    data = {"shard": shard, "rows": [asdict(row) for row in rows]}
    data["failed_sha256"] = fingerprint(data)
    return store.create(failed_name(shard), json.dumps(data, indent=1).encode())


def read_failed(store: Store, shard: str) -> tuple[FailedRow, ...]:
    """Return the rows of a shard that are set aside; none where there is no list, or a damaged one.

    A damaged list is removed: its shard then has too few rows and is made again.
    """
    try:
        raw = store.read(failed_name(shard))
    except FileNotFoundError:
        return ()
    rows = decode_failed(raw, shard)
    if rows is None:
        store.delete(failed_name(shard))
        return ()
    return rows


def decode_failed(raw: bytes, shard: str) -> tuple[FailedRow, ...] | None:
    """Read the list of a shard; None where it is damaged or another shard's."""
    try:
        data = json.loads(raw)
        stored = data.pop("failed_sha256")
        if fingerprint(data) == stored and data["shard"] == shard:
            return tuple(FailedRow(**row) for row in data["rows"])
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def read_failures(store: Store) -> dict[str, tuple[FailedRow, ...]]:
    """Return the rows that are set aside, by shard; one listing where there are none."""
    names = [name.removesuffix(".json") for name in store.list(FAILED) if name.endswith(".json")]
    found = {name: read_failed(store, name) for name in names}
    return {name: rows for name, rows in found.items() if rows}


def forget_failures(store: Store) -> int:
    """Make the shards with rows set aside count as missing, and forget the rows; return how many.

    Killed at any point, what is left is either still a list, or a shard that has to be made.
    """
    failures = read_failures(store)
    if failures:
        store.delete(MANIFEST)
    for shard in failures:
        split, _, index = shard.rpartition("-")
        store.delete(record_name(split, int(index)))
        store.delete(failed_name(shard))
    return sum(map(len, failures.values()))


def describe_set_aside(
    failures: Mapping[str, tuple[FailedRow, ...]],
    *,
    planned_rows: int,
    url: str,
    unanswered: Mapping[str, tuple[FailedRow, ...]] | None = None,
) -> CacheError:
    """Return the error with which a run ends that has set rows aside: it lists them.

    Args:
        failures: rows whose distributions are lacking.
        planned_rows: rows of the plan.
        url: the cache's.
        unanswered: responses that the teacher could not write, by shard of responses.
    """
    texts, do = [], []
    for what, found, remedy in (
        (
            f"{{}} of {planned_rows} rows, which the teacher could not answer",
            failures,
            "--retry-quarantined makes those rows again",
        ),
        (
            "{} responses, which the teacher could not write",
            unanswered or {},
            "what the teacher wrote is part of the cache's identity: another --cache_dir has "
            "those prompts tried again",
        ),
    ):
        rows = [(shard, row) for shard in sorted(found) for row in found[shard]]
        if rows:
            texts.append(f"{what.format(len(rows))}:{_listed(rows)}")
            do.append(remedy)
    return CacheError(
        f"{url}: complete but for " + "\nand for ".join(texts) + "\nThe cache can be used as it is",
        do="; ".join(do),
    )


def _listed(rows: Iterable[tuple[str, FailedRow]]) -> str:
    lines = []
    for shard, row in rows:
        split, _, index = shard.rpartition("-")
        lines.append(
            f"\n  - sample {row.sample_id} ({split}/{index}), {row.tries} tries: {row.error}"
        )
    more = len(lines) - _SHOWN
    return "".join(lines[:_SHOWN]) + (f"\n  ... and {more} more in {FAILED}/" if more > 0 else "")
