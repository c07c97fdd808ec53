"""Which shards are recorded, from a listing of the records' folder alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping

from pipeline.cache.layout.names import (
    SEGMENT_SHARDS,
    SPLITS,
    SegmentName,
    parse_segment,
    shard_label,
)

__all__ = ["Recorded", "missing_text"]

_SHOWN = 8


class Recorded:
    """The shards that a listing says are recorded; no record is read."""

    def __init__(self, files: Iterable[str]) -> None:
        """Take the names of the files in the records' folder; those of no segment are left out."""
        self.segments = tuple(sorted(found for file in files if (found := parse_segment(file))))
        self._spans = {split: _joined(self.segments, split) for split in SPLITS}
        self._blocks: dict[tuple[str, int], list[SegmentName]] = {}
        for item in self.segments:
            self._blocks.setdefault((item.split, item.first // SEGMENT_SHARDS), []).append(item)

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

    def in_block(self, block: SegmentName) -> list[SegmentName]:
        """Return the segments with any shard of a range between two multiples of 1024."""
        own = self._blocks.get((block.split, block.first // SEGMENT_SHARDS), [])
        return [item for item in own if item.first <= block.last and item.last >= block.first]

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


def missing_text(recorded: Recorded, planned: Mapping[str, int]) -> str:
    """Say how many of the planned shards have no record, and which, or nothing if all have one."""
    total = sum(planned.values())
    have = sum(recorded.count(split, count) for split, count in planned.items())
    if have == total:
        return ""
    names: list[str] = []
    for split, count in planned.items():
        for index in recorded.missing(split, count):
            if len(names) == _SHOWN:
                break
            names.append(shard_label(split, index))
    more = ", ..." if total - have > _SHOWN else ""
    return f"{total - have} of {total} shards missing: {', '.join(names)}{more}"
