"""Made-up records and files of shards, for tests of what is done with records alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.cache.io.finalize import finalize
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.manifest import Manifest
from pipeline.cache.layout.names import SegmentName, record_name, shard_name
from pipeline.cache.layout.records import ShardRecord, decode_segment, encode_record
from pipeline.storage import Store
from tests.unit.cache.sample_cache import SPEC, TEMPERATURES, sample_identity


class Killed(BaseException):
    """The process ends at this request."""


def made_up_data(split: str, index: int) -> bytes:
    """Return what stands for the shard's file."""
    return f"the file of {split} {index}".encode()


def made_up_record(split: str, index: int, *, rows: int = 2, **changes: Any) -> ShardRecord:
    """Return the record of that file."""
    data = made_up_data(split, index)
    ids = b"".join(
        hashlib.sha256(f"{split} {index} {row}".encode()).digest()[:16] for row in range(rows)
    )
    values: dict[str, Any] = {
        "split": split, "index": index, "path": shard_name(split, index), "rows": rows,
        "tokens": 7 * rows, "loss_tokens": 3 * rows, "entries": 5 * rows, "bytes": len(data),
        "xxh3_128": checksum(data), "kept_mass": 0.5, "entropy": 0.25,
        "source_xxh3_128": checksum(b"units"), "row_tokens": [7] * rows,
        "row_loss_tokens": [3] * rows, "row_ids": ids,
    }  # fmt: skip
    return ShardRecord(**{**values, **changes})


def commit_made_up(store: Store, split: str, index: int, **changes: Any) -> None:
    """Write such a shard and its record."""
    store.write(shard_name(split, index), made_up_data(split, index))
    record = made_up_record(split, index, **changes)
    store.write(record_name(split, index), encode_record(record))


def finalize_made_up(store: Store, shards: Mapping[str, int], **options: Any) -> Manifest:
    """Finish a cache of such shards."""
    values: dict[str, Any] = {
        "identity": sample_identity(), "spec": SPEC, "temperatures": TEMPERATURES,
        "corpus_counts": None, "tokenizer_files": [], "command": "made by a test",
    }  # fmt: skip
    return finalize(store, shards, **{**values, **options})


def decode_record(raw: bytes, split: str, index: int) -> ShardRecord | None:
    """Read the record of one shard; None where it is damaged or another's."""
    records = decode_segment(raw, SegmentName(split, index, index))
    return records[0] if records else None


def read_record(store: Store, split: str, index: int) -> ShardRecord | None:
    """Return the record under which a shard was committed; None where it has none of its own."""
    try:
        return decode_record(store.read(record_name(split, index)), split, index)
    except FileNotFoundError:
        return None


def intact_record(store: Store, split: str, index: int, *, check_bytes: bool) -> ShardRecord | None:
    """Return the record under which a shard was committed, if its file is there and of that size.

    With `check_bytes` the file's checksum is compared as well.
    """
    record = read_record(store, split, index)
    if record is None or store.size(record.path) != record.bytes:
        return None
    same = not check_bytes or checksum(store.read(record.path)) == record.xxh3_128
    return record if same else None


class Counted:
    """fsspec's file system of a store, which counts its requests and ends the process at one."""

    NAMES = ("cat_file", "pipe_file", "ls", "size", "exists", "rm_file", "rm", "open", "info")

    def __init__(self, real: Any) -> None:
        """Stand before `real`; nothing is counted yet."""
        self._real = real
        self.requests: list[str] = []
        self.killed_at: int | None = None
        self.after = False
        """Whether the request that the process ends at has its effect."""

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if name not in self.NAMES:
            return real

        def call(*args: Any, **options: Any) -> Any:
            self.requests.append(name)
            dies = self.killed_at is not None and len(self.requests) > self.killed_at
            if dies and not self.after:
                raise Killed
            result = real(*args, **options)
            if dies:
                raise Killed
            return result

        return call


def counted(url: str) -> tuple[Store, Counted]:
    """Return a store whose requests are counted."""
    store = Store(url)
    file_system = Counted(store._fs)
    store._fs = file_system
    return store, file_system


def contents(
    store: Store, folders: tuple[str, ...] = ("", "_meta", "_meta/shards")
) -> Iterator[Any]:
    """Yield name and content of every file in these folders."""
    for folder in folders:
        for file in store.list(folder):
            name = f"{folder}/{file}" if folder else file
            yield name, store.read(name)
