"""Records in few files: fold those of a block into one, take shards out again.

A *block* is a range of shards between two multiples of `SEGMENT_SHARDS`. Every step leaves each
record in at least one file until another file that has it is complete, so a killed call is only
repeated. Where two files hold different records of one shard (a worker that was overtaken), the
shard's own file decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.manifest import Segment, segment_of
from pipeline.cache.layout.names import (
    MANIFEST,
    RECORDS,
    SEGMENT_SHARDS,
    SegmentName,
    parse_segment,
)
from pipeline.cache.layout.recorded import Recorded
from pipeline.cache.layout.records import ShardRecord, decode_segment, encode_segment
from pipeline.storage import Store
from pipeline.storage.parallel import in_threads

__all__ = ["Folded", "blocks", "fold", "read_block", "reopen"]

_REQUESTS_AT_ONCE = 16
"""An object store answers each in 20 to 50 ms, and a block can be 1,024 files."""


@dataclass(frozen=True, slots=True)
class Folded:
    """What became of a block."""

    segment: Segment | None
    """The entry of the one file with all records; None where shards are missing."""
    missing: tuple[tuple[str, int], ...] = ()
    """Split and index of the shards that have to be made: they have no record now."""


@dataclass(slots=True)
class _Block:
    """The records of one block, wherever they lie."""

    by_file: dict[SegmentName, list[ShardRecord]] = field(default_factory=dict)
    whole: bytes | None = None
    """The file that has just the block's records, if it is there and intact."""
    damaged: list[SegmentName] = field(default_factory=list)
    vanished: bool = False
    """A file is gone since it was listed."""

    def of_shard(self) -> dict[int, list[ShardRecord]]:
        """Return the records by index; several where files contradict each other."""
        found: dict[int, list[ShardRecord]] = {}
        for records in self.by_file.values():
            for record in records:
                others = found.setdefault(record.index, [])
                if record not in others:
                    others.append(record)
        return found


def blocks(shards: Mapping[str, int]) -> Iterator[SegmentName]:
    """Yield the blocks of a cache with so many shards of each split; train first."""
    for split, count in shards.items():
        for first in range(0, count, SEGMENT_SHARDS):
            yield SegmentName(split, first, min(first + SEGMENT_SHARDS, count) - 1)


def fold(
    store: Store,
    block: SegmentName,
    *,
    files: Sequence[str] | None = None,
    sizes: Mapping[str, int] | None = None,
    accept: Callable[[ShardRecord], bool] = lambda record: True,
) -> Folded:
    """Write the records of a block into one file and delete the files that held them.

    One worker at a time: who that is, a lease decides. Nothing is folded where a record is missing;
    a damaged file of records is deleted, and so are records that do not fit: their shards are
    captured again, to the same bytes.

    Args:
        store: the cache's root.
        block: split, first and last shard.
        files: a listing of the records' folder, where the caller has one.
        sizes: of the files of the split's shards, by name; records are compared with them.
        accept: whether a record is of the shard that was planned.

    Raises:
        StoreError: the store fails.
    """
    found = _read(store, block, store.list(RECORDS) if files is None else files)
    if found.vanished:
        found = _read(store, block, store.list(RECORDS))
    by_index = found.of_shard()
    records, missing = _chosen(store, by_index, block, sizes, accept)
    if missing:
        # A listing tells what is recorded: what has to be made again must not be in it, and what
        # lacks a shard is not complete.
        store.delete(MANIFEST)
        _take_out(store, found.by_file, {index for _, index in missing} & set(by_index))
        store.delete_all([item.path for item in found.damaged])
        return Folded(None, tuple(missing))
    raw = found.whole
    others = [item.path for item in (*found.by_file, *found.damaged) if item != block]
    if raw is None or others:
        encoded = encode_segment(records)
        if encoded != raw:
            store.write(block.path, encoded)
        raw = encoded
        store.delete_all(others)
    return Folded(segment_of(records, size=len(raw), xxh3_128=checksum(raw)))


def read_block(
    store: Store, block: SegmentName, files: Iterable[str]
) -> dict[int, list[ShardRecord]]:
    """Return the intact records of a block by index; several where files contradict each other.

    Args:
        store: the cache's root.
        block: split, first and last shard.
        files: a listing of the records' folder.
    """
    return _read(store, block, files).of_shard()


def reopen(
    store: Store, shards: Iterable[tuple[str, int]], *, files: Sequence[str] | None = None
) -> tuple[tuple[str, int], ...]:
    """Make shards unrecorded, so that stage one makes them again; return all that are unrecorded.

    The manifest goes first: from here on the cache is incomplete. The other records of a folded
    file are written as smaller files before it is deleted. A file that is damaged takes all its
    shards with it, which the result names too.

    Args:
        store: the cache's root.
        shards: split and index of each.
        files: a listing of the records' folder, where the caller has one.
    """
    wanted = set(shards)
    if not wanted:
        return ()
    store.delete(MANIFEST)
    listed = store.list(RECORDS) if files is None else files
    named = [item for item in map(parse_segment, listed) if item is not None]
    touched = [
        item for item in named if any((item.split, index) in wanted for index in item.shards)
    ]
    damaged: list[SegmentName] = []
    for block in sorted({_block_of(item) for item in touched}):
        own = [item for item in touched if _block_of(item) == block]
        found = _read(store, block, [item.path.rsplit("/", 1)[-1] for item in own])
        _take_out(store, found.by_file, {index for split, index in wanted if split == block.split})
        store.delete_all([item.path for item in found.damaged])
        damaged += found.damaged
    lost = {(item.split, index) for item in damaged for index in item.shards}
    if lost:
        left = Recorded(store.list(RECORDS))
        lost = {key for key in lost if key not in left}
    return tuple(sorted(wanted | lost))


def _block_of(item: SegmentName) -> SegmentName:
    first = item.first // SEGMENT_SHARDS * SEGMENT_SHARDS
    return SegmentName(item.split, first, first + SEGMENT_SHARDS - 1)


def _read(store: Store, block: SegmentName, files: Iterable[str]) -> _Block:
    """Read every file with records of the block."""
    named = (parse_segment(file) for file in files)
    own = sorted(
        item
        for item in named
        if item is not None
        and item.split == block.split
        and item.first <= block.last
        and item.last >= block.first
    )
    found = _Block()

    def read(item: SegmentName) -> bytes | None:
        try:
            return store.read(item.path)
        except FileNotFoundError:
            return None  # folded or taken out since it was listed

    for item, raw in zip(own, in_threads(read, own, _REQUESTS_AT_ONCE), strict=True):
        records = None if raw is None else decode_segment(raw, item)
        if raw is None:
            found.vanished = True
        elif records is None:
            found.damaged.append(item)
        else:
            found.by_file[item] = records
            found.whole = raw if item == block else found.whole
    return found


def _chosen(
    store: Store,
    by_index: Mapping[int, Sequence[ShardRecord]],
    block: SegmentName,
    sizes: Mapping[str, int] | None,
    accept: Callable[[ShardRecord], bool],
) -> tuple[list[ShardRecord], list[tuple[str, int]]]:
    """Return one record for each shard of the block, and the shards without one that fits."""
    records: list[ShardRecord] = []
    missing: list[tuple[str, int]] = []
    for index in block.shards:
        fit = [
            record
            for record in by_index.get(index, ())
            if accept(record)
            and (sizes is None or sizes.get(record.path.rsplit("/", 1)[-1]) == record.bytes)
        ]
        if len(fit) > 1:
            fit = [record for record in fit if _is_of(store, record)]
        if fit:
            records.append(fit[0])
        else:
            missing.append((block.split, index))
    return records, missing


def _is_of(store: Store, record: ShardRecord) -> bool:
    """Whether the shard's file is the one that was recorded."""
    try:
        return checksum(store.read(record.path)) == record.xxh3_128
    except FileNotFoundError:
        return False


def _take_out(
    store: Store, by_file: Mapping[SegmentName, Sequence[ShardRecord]], indexes: set[int]
) -> None:
    """Replace the files that hold some records by files without these."""
    spoiled = [item for item in by_file if not indexes.isdisjoint(item.shards)]
    for item in spoiled:
        for run in _runs(index for index in item.shards if index not in indexes):
            piece = SegmentName(item.split, run[0], run[-1])
            if piece not in by_file:
                start = run[0] - item.first
                store.write(piece.path, encode_segment(by_file[item][start : start + len(run)]))
    store.delete_all([item.path for item in spoiled])


def _runs(indexes: Iterable[int]) -> Iterator[list[int]]:
    run: list[int] = []
    for index in indexes:
        if run and index != run[-1] + 1:
            yield run
            run = []
        run.append(index)
    if run:
        yield run
