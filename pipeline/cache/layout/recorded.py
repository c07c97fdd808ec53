"""Which shards are recorded, from a listing of the records' folder alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping

from pipeline.cache.layout.names import (
    SPLITS,
    SegmentName,
    parse_segment,
    record_name,
    shard_label,
)

__all__ = ["Recorded", "missing_text", "record_files"]


class Recorded:
    """The shards that a listing says are recorded; no record is read."""

    def __init__(self, files: Iterable[str]) -> None:
        """Take the names of the files in the records' folder; those of no segment are left out."""
        self.segments = tuple(sorted(found for file in files if (found := parse_segment(file))))
        self._spans = {split: _joined(self.segments, split) for split in SPLITS}

    def __contains__(self, key: tuple[str, int]) -> bool:
        """Whether a shard, by split and index, is recorded."""
        split, index = key
        spans = self._spans[split]
        place = bisect_right(spans, (index, _END)) - 1
        return place >= 0 and index < spans[place][1]

    def __len__(self) -> int:
        """Return the number of recorded shards."""
        return sum(self.count(split) for split in SPLITS)

    def count(self, split: str, stop: int | None = None) -> int:
        """Return the number of recorded shards of a split, of those below `stop`."""
        limit = _END if stop is None else stop
        return sum(max(0, min(end, limit) - start) for start, end in self._spans[split])

    def shards(self, split: str) -> Iterator[int]:
        """Yield the indexes of a split's recorded shards, ascending."""
        for start, end in self._spans[split]:
            yield from range(start, end)

    def missing(self, split: str, count: int) -> Iterator[int]:
        """Yield the indexes below `count` without a record, ascending."""
        at = 0
        for start, end in [*self._spans[split], (count, count)]:
            yield from range(at, min(start, count))
            at = max(at, end)


_END = 1 << 62


def _joined(segments: Iterable[SegmentName], split: str) -> list[tuple[int, int]]:
    """Return the ranges of a split as sorted [start, stop) without overlap."""
    spans: list[tuple[int, int]] = []
    for item in segments:
        if item.split != split:
            continue
        start, stop = item.first, item.last + 1
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], stop))
        else:
            spans.append((start, stop))
    return spans


def record_files(files: Iterable[str]) -> set[str]:
    """Return the file names that a listing stands for, one for each recorded shard.

    They are the names under which shards are committed, whether or not they are folded by now.
    """
    return {
        record_name(item.split, index).rsplit("/", 1)[-1]
        for item in Recorded(files).segments
        for index in item.shards
    }


def missing_text(recorded: Recorded, planned: Mapping[str, int], shown: int = 8) -> str:
    """Say how many of the planned shards have no record, and which, or nothing if all have one."""
    total = sum(planned.values())
    have = sum(recorded.count(split, count) for split, count in planned.items())
    if have == total:
        return ""
    names: list[str] = []
    for split, count in planned.items():
        for index in recorded.missing(split, count):
            if len(names) == shown:
                break
            names.append(shard_label(split, index))
    more = ", ..." if total - have > shown else ""
    return f"{total - have} of {total} shards missing: {', '.join(names)}{more}"
