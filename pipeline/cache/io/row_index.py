"""The row lengths of a cache, and a line for each shard: one file a node, mapped by its processes.

At a billion rows the lengths are 8 GB: too much for each of a node's processes, and too much to
fetch for each. One process writes the file, the others wait. It is named by the checksums of
the segments, so that it is never of another cache; its parts carry their own checksums, and one
that is damaged is written again.

Shapes: R rows, S shards of the cache, G segments; train first.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.cache.io.segments import segment_columns
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.manifest import Manifest, Segment
from pipeline.cache.layout.names import SPLITS, shard_name
from pipeline.cache.layout.records import LENGTHS, ShardRecord
from pipeline.storage import Store
from pipeline.storage.local_folder import local_folder, locked, remove_old

__all__ = ["RowIndex", "ShardLines", "open_row_index"]

_log = logging.getLogger(__name__)

_SMALL_ROWS = 1 << 20
_SMALL_SEGMENTS = 8
"""Up to so many rows and segments each process keeps 8 MB and makes 8 requests, and no file."""
_LAYOUT = 1
"""Of the file; a file of another layout has another name."""
_LINE = np.dtype(
    [
        ("first_row", "<i8"),
        ("rows", "<i4"),
        ("tokens", "<i8"),
        ("loss_tokens", "<i8"),
        ("entries", "<i8"),
        ("bytes", "<i8"),
        ("kept_mass", "<f8"),
        ("entropy", "<f8"),
        ("xxh3_128", "S32"),
        ("source_xxh3_128", "S32"),
    ]
)


class RowIndex:
    """What planning needs of all records, in memory or mapped from a file."""

    def __init__(
        self, manifest: Manifest, rows_R2: NDArray[np.int32], lines_S: NDArray[Any]
    ) -> None:
        """Use `open_row_index`."""
        self._rows_R2 = rows_R2
        self._lines_S = lines_S
        counts = manifest.shard_counts
        self._starts = {
            split: sum(counts.get(other, 0) for other in SPLITS[:place])
            for place, split in enumerate(SPLITS)
        }
        self._counts = counts

    def lines(self, split: str) -> ShardLines:
        """Return the records of a split, without their rows."""
        start = self._starts[split]
        return ShardLines(split, self._lines_S[start : start + self._counts.get(split, 0)])

    def sizes(self, split: str, shard: int) -> NDArray[np.int32]:
        """Return tokens and supervised tokens of each row of a shard, int32 [rows, 2]."""
        line = self._lines_S[self._starts[split] + shard]
        first = int(line["first_row"])
        return self._rows_R2[first : first + int(line["rows"])]

    def all_sizes(self, split: str) -> NDArray[np.int32]:
        """Return those of all rows of a split, shard after shard."""
        start = self._starts[split]
        lines = self._lines_S[start : start + self._counts.get(split, 0)]
        if not len(lines):
            return np.zeros((0, 2), np.int32)
        end = int(lines[-1]["first_row"]) + int(lines[-1]["rows"])
        return self._rows_R2[int(lines[0]["first_row"]) : end]


class ShardLines(Sequence[ShardRecord]):
    """The records of a split without their rows; each is made when it is asked for."""

    def __init__(self, split: str, lines_S: NDArray[Any]) -> None:
        """Keep the lines."""
        self._split = split
        self._lines_S = lines_S

    def __len__(self) -> int:
        """Return the number of shards."""
        return len(self._lines_S)

    @overload
    def __getitem__(self, place: int) -> ShardRecord: ...

    @overload
    def __getitem__(self, place: slice) -> list[ShardRecord]: ...

    def __getitem__(self, place: int | slice) -> ShardRecord | list[ShardRecord]:
        """Return the record of a shard, or those of several."""
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        index = place if place >= 0 else len(self) + place
        line = self._lines_S[index]
        return ShardRecord(
            split=self._split,
            index=index,
            path=shard_name(self._split, index),
            rows=int(line["rows"]),
            tokens=int(line["tokens"]),
            loss_tokens=int(line["loss_tokens"]),
            entries=int(line["entries"]),
            bytes=int(line["bytes"]),
            xxh3_128=line["xxh3_128"].decode(),
            kept_mass=float(line["kept_mass"]),
            entropy=float(line["entropy"]),
            source_xxh3_128=line["source_xxh3_128"].decode(),
        )

    def rows(self) -> NDArray[np.int32]:
        """Return the rows of each shard."""
        return np.asarray(self._lines_S["rows"])


def open_row_index(store: Store, manifest: Manifest) -> RowIndex:
    """Return the index of a cache; of a large one from a file of this node, written if missing.

    Where no file can be kept (a full disk) the index stays in this process's memory.

    Raises:
        CacheError: a segment is missing or damaged.
        StoreError: the store fails.
    """
    total = manifest.total()
    small = total.rows <= _SMALL_ROWS and len(manifest.segments) <= _SMALL_SEGMENTS
    folder = None if small else local_folder("row-lengths")
    if folder is not None:
        try:
            return _from_file(store, manifest, folder)
        except OSError as error:
            _log.warning(
                "%s: the row lengths cannot be kept there (%s); each process holds its own",
                folder,
                error.strerror or error,
            )
    elif not small:
        _log.warning(
            "no local folder can be written to: each process holds the row lengths for itself; set "
            "XDG_CACHE_HOME or TMPDIR to a folder on a local disk"
        )
    rows_R2 = np.zeros((total.rows, 2), np.int32)
    lines_S = np.zeros(total.shards, _LINE)
    row = line = 0
    for segment, part_R2, part_S in _parts(store, manifest):
        rows_R2[row : row + segment.rows] = part_R2
        lines_S[line : line + segment.shards] = part_S
        row, line = row + segment.rows, line + segment.shards
    return RowIndex(manifest, rows_R2, lines_S)


def _parts(
    store: Store, manifest: Manifest
) -> Iterator[tuple[Segment, NDArray[np.int32], NDArray[Any]]]:
    """Yield row lengths and lines of each segment."""
    before = 0
    for segment in manifest.segments:
        table = segment_columns(store, segment, LENGTHS)
        columns = [
            table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
            for name in LENGTHS
        ]
        lines_S = np.zeros(segment.shards, _LINE)
        for name in _LINE.names or ():
            if name != "first_row":
                lines_S[name] = table.column(name).to_pylist()
        ends_S = np.cumsum(lines_S["rows"], dtype=np.int64)
        lines_S["first_row"] = before + ends_S - lines_S["rows"]
        before += segment.rows
        yield segment, np.stack(columns, axis=1).astype(np.int32, copy=False), lines_S


def _from_file(store: Store, manifest: Manifest, folder: Path) -> RowIndex:
    name = checksum("".join([str(_LAYOUT), *(s.xxh3_128 for s in manifest.segments)]).encode())
    path = folder / f"{name}.rows"
    found = _mapped(manifest, path)
    if found is None:
        with locked(folder / f"{name}.lock"):
            # Written by another process while this one waited.
            found = _mapped(manifest, path)
            if found is None:
                remove_old(folder, "*.rows*")
                _write(store, manifest, path)
                found = _mapped(manifest, path)
    if found is None:
        raise OSError(f"{path} is not as it was written")
    with contextlib.suppress(OSError):
        os.utime(path)
    return found


def _write(store: Store, manifest: Manifest, path: Path) -> None:
    """Write the file: row lengths, lines, and the checksums of both."""
    # Only the holder of the lock writes this name; what a killed one left is cut off.
    unfinished = path.with_suffix(".rows-unfinished")
    with unfinished.open("wb") as file:
        digests: list[bytes] = []
        lines: list[NDArray[Any]] = []
        for _, part_R2, part_S in _parts(store, manifest):
            digests.append(_write_part(file, part_R2))
            lines.append(part_S)
        digests.append(_write_part(file, np.concatenate(lines)))
        file.write(b"".join(digests))
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _write_part(file: BinaryIO, values: NDArray[Any]) -> bytes:
    data = np.ascontiguousarray(values).tobytes()
    file.write(data)
    return xxhash.xxh3_64_digest(data)


def _mapped(manifest: Manifest, path: Path) -> RowIndex | None:
    """Map the file; None where it is missing or damaged.

    All of it is read once for the checksums, at the rate of the page cache; nothing is kept.
    """
    total = manifest.total()
    parts = [8 * segment.rows for segment in manifest.segments] + [total.shards * _LINE.itemsize]
    try:
        if path.stat().st_size != sum(parts) + 8 * len(parts):
            return None
        data = np.memmap(path, np.uint8, "r")
    except FileNotFoundError:
        return None
    digests = data[sum(parts) :].tobytes()
    start = 0
    for place, size in enumerate(parts):
        wanted = digests[8 * place : 8 * place + 8]
        if xxhash.xxh3_64_digest(data[start : start + size].data) != wanted:
            _log.warning("%s: damaged; it is written again", path)
            return None
        start += size
    rows_R2 = data[: 8 * total.rows].view("<i4").reshape(-1, 2)
    return RowIndex(manifest, rows_R2, data[8 * total.rows : sum(parts)].view(_LINE))
