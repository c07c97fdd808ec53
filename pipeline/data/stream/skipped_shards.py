"""Shards that a run does without because they are damaged: what is known of them, and the file.

The file is part of the run's state: a run that goes on leaves the same shards out from the same
steps on, without looking at them again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import ResumeError
from pipeline.storage import Store

__all__ = ["LEFT_OUT_FILE", "LeftOut", "read_left_out", "write_left_out"]

LEFT_OUT_FILE = "left-out.json"


@dataclass(frozen=True, slots=True, order=True)
class LeftOut:
    """One shard of the training rows that is not used."""

    shard: int
    """Its number in the split, in the manifest's order."""
    from_step: int
    """The first step, from 0, that does without it."""
    path: str
    """Its name in the cache."""
    rows: int
    reason: str


def read_left_out(folder: Path) -> list[LeftOut]:
    """Return what a run left out so far; nothing where it left nothing out.

    Raises:
        ResumeError: the file is damaged.
    """
    file = folder / LEFT_OUT_FILE
    try:
        return [LeftOut(**record) for record in json.loads(file.read_bytes())]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError):
        raise ResumeError(
            f"{file}: not readable",
            expected="the list of shards that this run does without",
            do="start anew with --resume_from_checkpoint never",
        ) from None


def write_left_out(folder: Path, records: Iterable[LeftOut]) -> None:
    """Write the list anew, atomically; an empty one removes the file."""
    data = [asdict(record) for record in sorted(records)]
    store = Store(str(folder))
    if data:
        store.write(LEFT_OUT_FILE, json.dumps(data, indent=1).encode())
    else:
        store.delete(LEFT_OUT_FILE)
