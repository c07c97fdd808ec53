"""Which samples occur more than once among all rows of a cache, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.storage.scratch import ScratchFile

__all__ = ["Repeats", "SampleIds"]

_IN_MEMORY = 1 << 22
"""Rows up to which all are sorted at once: 84 MB. More are divided by the first byte of their id
into files that have no name: at a billion rows 20 GB of the local disk, 80 MB at a time in
memory."""
_BUFFER_BYTES = 1 << 16
_ROW = np.dtype([("id", "V16"), ("owner", "<i4")])


@dataclass(frozen=True, slots=True)
class Repeats:
    """Rows whose sample has occurred before, in an earlier shard or the same."""

    rows: int = 0
    by_owner: Counter[int] = field(default_factory=Counter)
    """Such rows of each shard."""
    across: Counter[int] = field(default_factory=Counter)
    """Those of them whose sample is in the other split too, for each shard."""


class SampleIds:
    """The ids of all rows with the place of their shard; shards of `train` come first."""

    def __init__(self, *, in_memory: int = _IN_MEMORY) -> None:
        """Start without any; `in_memory` rows are kept before files are used."""
        self._in_memory = in_memory
        self._parts: list[NDArray[Any]] = []
        self._rows = 0
        self._files: dict[int, ScratchFile] = {}

    def add(self, row_ids: bytes, owner: int) -> None:
        """Add the ids of a shard, 16 bytes a row.

        Raises:
            ResourceError: the disk is full.
        """
        rows = np.empty(len(row_ids) // 16, _ROW)
        rows["id"] = np.frombuffer(row_ids, "V16")
        rows["owner"] = owner
        self._parts.append(rows)
        self._rows += rows.size
        if self._rows > self._in_memory:
            self._spill()

    def repeats(self, first_heldout: int) -> Repeats:
        """Return the repeats; shards from the place `first_heldout` on are held out.

        Raises:
            ResourceError: the disk fails.
        """
        found = Repeats()
        total = 0
        for rows in self._buckets():
            # The bytes as they are: as text, numpy would take zeros off their ends.
            order = np.lexsort((rows["owner"], *_words(rows)))
            rows = rows[order]
            one, two = _words(rows)
            again = np.flatnonzero((one[1:] == one[:-1]) & (two[1:] == two[:-1])) + 1
            owners = rows["owner"]
            heldout = owners >= first_heldout
            across = again[heldout[again] != heldout[again - 1]]
            total += again.size
            _count(found.by_owner, owners[again])
            _count(found.across, owners[across])
        return Repeats(total, found.by_owner, found.across)

    def _spill(self) -> None:
        rows = np.concatenate([np.zeros(0, _ROW), *self._parts])
        if not rows.size:
            return
        buckets = np.ascontiguousarray(rows["id"]).view(np.uint8).reshape(-1, 16)[:, 0]
        order = np.argsort(buckets, kind="stable")
        rows, buckets = rows[order], buckets[order]
        starts = np.searchsorted(buckets, np.arange(257))
        for bucket in np.unique(buckets).tolist():
            file = self._files.get(bucket)
            if file is None:
                file = self._files[bucket] = ScratchFile("sample ids", buffer_bytes=_BUFFER_BYTES)
            file.append(rows[starts[bucket] : starts[bucket + 1]].tobytes())
        self._parts, self._rows = [], 0

    def _buckets(self) -> Iterator[NDArray[Any]]:
        if not self._files:
            yield np.concatenate([np.zeros(0, _ROW), *self._parts])
            return
        self._spill()
        for file in self._files.values():
            file.flush()
            rows = np.empty(file.size // _ROW.itemsize, _ROW)
            file.read_into(rows, 0)
            yield rows


def _words(rows: NDArray[Any]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return both halves of each id as numbers."""
    halves = np.ascontiguousarray(rows["id"]).view("<u8").reshape(-1, 2)
    return halves[:, 0], halves[:, 1]


def _count(into: Counter[int], owners: NDArray[np.int32]) -> None:
    places, times = np.unique(owners, return_counts=True)
    for place, number in zip(places.tolist(), times.tolist(), strict=True):
        into[place] += number
