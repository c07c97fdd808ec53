"""Quarantined rows: rows of the plan that the engine fails on, each with its error and attempts.

A shard with such rows is written without them. A shard's list is
`_meta/quarantine/SPLIT-NNNNN.json` and is written once, before the shard's record. The rows of the
record and of the list must together be the rows of the plan; otherwise the shard is computed again.
A shard in which no row failed has no list.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass

from pipeline.cache.layout.fold import reopen
from pipeline.cache.layout.names import RESPONSES, parse_shard
from pipeline.config import fingerprint
from pipeline.errors import RowsQuarantined
from pipeline.storage import Store

__all__ = [
    "QUARANTINE",
    "QuarantinedRow",
    "clear_quarantine",
    "decode_quarantine",
    "describe_quarantine",
    "quarantine_name",
    "quarantine_rows",
    "read_quarantine",
    "read_quarantined_rows",
]

QUARANTINE = "_meta/quarantine"
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class QuarantinedRow:
    """One row that is missing from its shard."""

    sample_id: str
    error: str
    tries: int


def quarantine_name(shard: str) -> str:
    """Return the path of the list of a shard such as `train-00000`."""
    return f"{QUARANTINE}/{shard}.json"


def quarantine_rows(store: Store, shard: str, rows: Collection[QuarantinedRow]) -> bool:
    """Write a shard's list unless another worker has written one; return whether it was written."""
    data = {"shard": shard, "rows": [asdict(row) for row in rows]}
    data["quarantine_sha256"] = fingerprint(data)
    return store.create(quarantine_name(shard), json.dumps(data, indent=1).encode())


def read_quarantined_rows(store: Store, shard: str) -> tuple[QuarantinedRow, ...]:
    """Return the quarantined rows of a shard; none where there is no list or a damaged one.

    A damaged list is removed: its shard then has too few rows and is computed again.
    """
    try:
        raw = store.read(quarantine_name(shard))
    except FileNotFoundError:
        return ()
    rows = decode_quarantine(raw, shard)
    if rows is None:
        store.delete(quarantine_name(shard))
        return ()
    return rows


def decode_quarantine(raw: bytes, shard: str) -> tuple[QuarantinedRow, ...] | None:
    """Read the list of a shard; None where it is damaged or another shard's."""
    try:
        data = json.loads(raw)
        stored = data.pop("quarantine_sha256")
        if fingerprint(data) == stored and data["shard"] == shard:
            return tuple(QuarantinedRow(**row) for row in data["rows"])
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def read_quarantine(store: Store) -> dict[str, tuple[QuarantinedRow, ...]]:
    """Return the quarantined rows by shard; where there are none, one folder listing is all."""
    names = [
        name.removesuffix(".json") for name in store.list(QUARANTINE) if name.endswith(".json")
    ]
    found = {name: read_quarantined_rows(store, name) for name in names}
    return {name: rows for name, rows in found.items() if rows}


def clear_quarantine(store: Store) -> int:
    """Remove every list and its shard's record, so that the shard is missing; return the rows.

    If the process is killed, each shard still has its list or has to be computed.
    """
    failures = read_quarantine(store)
    reopen(store, [key for shard in failures if (key := parse_shard(shard)) is not None])
    store.delete_all([quarantine_name(shard) for shard in failures])
    return sum(map(len, failures.values()))


def describe_quarantine(
    failures: Mapping[str, tuple[QuarantinedRow, ...]],
    *,
    planned_rows: int,
    url: str,
    responses: Mapping[str, tuple[QuarantinedRow, ...]] | None = None,
) -> RowsQuarantined:
    """Return the error that ends a run with quarantined rows and lists them.

    Args:
        failures: the quarantined rows.
        planned_rows: rows of the plan.
        url: the cache's.
        responses: responses that the teacher could not write, by shard of responses.
    """
    texts, do = [], []
    for what, found, place, remedy in (
        (
            f"{{}} of {planned_rows} rows, which are quarantined because the teacher fails on them",
            failures,
            f"{QUARANTINE}/",
            "--retry-quarantined tries those rows again",
        ),
        (
            "{} responses, which the teacher could not write",
            responses or {},
            f"{RESPONSES}/, column `error`",
            "the shards are made from the responses as they are: another --cache_dir has those "
            "prompts tried again",
        ),
    ):
        rows = [(shard, row) for shard in sorted(found) for row in found[shard]]
        if rows:
            texts.append(f"{what.format(len(rows))}:{_listed(rows, place)}")
            do.append(remedy)
    return RowsQuarantined(
        f"{url}: complete but for " + "\nand for ".join(texts) + "\nThe cache can be used as it is",
        do="; ".join(do),
    )


def _listed(rows: Iterable[tuple[str, QuarantinedRow]], place: str) -> str:
    lines = []
    for shard, row in rows:
        split, _, index = shard.rpartition("-")
        lines.append(
            f"\n  - sample {row.sample_id} ({split}/{index}), {row.tries} tries: {row.error}"
        )
    more = len(lines) - _SHOWN
    return "".join(lines[:_SHOWN]) + (f"\n  ... and {more} more in {place}" if more > 0 else "")
