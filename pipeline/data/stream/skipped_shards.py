"""Shards that a run skips because they are damaged: what is known of them, and the file.

The file is part of the run's state: a run that is resumed skips the same shards from the same
steps on, without reading them again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import ResumeError
from pipeline.storage import Store

__all__ = ["SKIPPED_SHARDS_FILE", "SkippedShard", "read_skipped_shards", "write_skipped_shards"]

SKIPPED_SHARDS_FILE = "skipped-shards.json"


@dataclass(frozen=True, slots=True, order=True)
class SkippedShard:
    """One shard of the training rows that is not used."""

    shard: int
    """Its number in the split, by index."""
    from_step: int
    """The first step, from 0, that skips it."""
    path: str
    """Its name in the cache."""
    rows: int
    reason: str


def read_skipped_shards(folder: Path) -> list[SkippedShard]:
    """Return what a run has skipped so far; nothing where it skipped nothing.

    Raises:
        ResumeError: the file is damaged.
    """
    file = folder / SKIPPED_SHARDS_FILE
    try:
        return [SkippedShard(**record) for record in json.loads(file.read_bytes())]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError):
        raise ResumeError(
            f"{file}: not readable",
            expected="the list of shards that this run skips",
            do="start from the beginning with --resume_from_checkpoint never",
        ) from None


def write_skipped_shards(folder: Path, records: Iterable[SkippedShard]) -> None:
    """Replace the list, atomically; an empty one removes the file."""
    data = [asdict(record) for record in sorted(records)]
    store = Store(str(folder))
    if data:
        store.write(SKIPPED_SHARDS_FILE, json.dumps(data, indent=1).encode())
    else:
        store.delete(SKIPPED_SHARDS_FILE)
