"""Copies of a remote cache's shards on a local disk: checked at every read, shared, bounded.

A copy is named by the checksum of its bytes, so ranks, runs and caches can share a folder, and a
copy may be damaged but is never of another shard. Its bytes are checked at every read, so it need
not be synced: a copy that a power cut or a failing disk has damaged is fetched again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from pipeline.amounts import format_bytes
from pipeline.cache.layout.embedded_checksum import checksum

__all__ = ["LocalCopies", "StoredCopy"]

_log = logging.getLogger(__name__)

_COPY = re.compile(r"[0-9a-f]{32}\.shard")
_UNFINISHED = re.compile(r"[0-9a-f]{32}\.partial")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StoredCopy(NamedTuple):
    """A copy in a folder, or an unfinished one."""

    used: float
    """When it was last read or written."""
    size_bytes: int
    path: Path


class LocalCopies:
    """A folder of copies, shared by any number of processes and threads.

    If the disk fails or is full, no more copies are kept and one warning is logged; the run goes
    on.
    """

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        """Make the folder and remove the unfinished files of killed processes.

        Args:
            folder: on a local disk; other files in it are never touched.
            limit_bytes: of all copies; the least recently used are removed first. Processes that
                write at the same moment can exceed it by a shard each.
        """
        self.folder = Path(folder)
        """Where the copies are."""
        self._limit_bytes = limit_bytes
        self._keeps = True
        with self._failures_end_it():
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in self.folder.iterdir():
                if _UNFINISHED.fullmatch(file.name):
                    _remove_if_abandoned(file)

    @staticmethod
    def stored(folder: Path) -> list[StoredCopy]:
        """Return what is in a folder, but for what another process removes meanwhile."""
        found = []
        for path in folder.iterdir():
            if _COPY.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found.append(StoredCopy(status.st_mtime, status.st_size, path))
        return found

    def read(self, wanted: str, fetch: Callable[[], bytes]) -> bytes:
        """Return the bytes with this checksum from their copy, or what `fetch` returns.

        Of several processes that lack the same copy one fetches, the others wait for it.

        Args:
            wanted: XXH3-128 of the bytes, 32 hexadecimal digits.
            fetch: reads them from the store. Its result is kept if it has the checksum, and
                returned in any case.
        """
        copy = self._read_copy(wanted)
        if copy is not None or not self._keeps:
            return fetch() if copy is None else copy
        with self._unfinished(wanted) as file:
            # Fetched by another process while this one waited.
            copy = self._read_copy(wanted)
            if copy is not None:
                return copy
            data = fetch()
            if file is not None and checksum(data) == wanted:
                self._keep(wanted, data, file)
            return data

    def _read_copy(self, wanted: str) -> bytes | None:
        path = self._path(wanted)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("%s: cannot be read (%s); the shard is fetched again", path, error)
            return None
        if checksum(data) != wanted:
            _log.warning("%s: this copy of a shard is damaged; it is fetched again", path)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        # Many mounts do not keep access times; eviction uses this one.
        with contextlib.suppress(OSError):
            os.utime(path)
        return data

    def _path(self, wanted: str) -> Path:
        return self.folder / f"{wanted}.shard"

    @contextlib.contextmanager
    def _unfinished(self, wanted: str) -> Iterator[BinaryIO | None]:
        """Lock the unfinished file of a copy; None where that fails.

        The lock is on the file itself: it ends with its process, even if killed, and the next
        process takes the file over.
        """
        file: BinaryIO | None = None
        with self._failures_end_it():
            file = _lock(self.folder / f"{wanted}.partial")
        try:
            yield file
        finally:
            if file is not None:
                # It still exists unless it has become the copy.
                _remove(Path(file.name), file)
                file.close()

    def _keep(self, wanted: str, data: bytes, file: BinaryIO) -> None:
        if len(data) > self._limit_bytes:
            self._end(f"a shard of {format_bytes(len(data))} is larger than the limit")
            return
        with self._failures_end_it():
            self._make_room(len(data))
            if os.fstat(file.fileno()).st_size:  # what a killed process has written
                file.truncate(0)
            left = memoryview(data)
            while left:
                left = left[os.write(file.fileno(), left) :]
            os.replace(file.name, self._path(wanted))

    def _make_room(self, wanted_bytes: int) -> None:
        found = self.stored(self.folder)
        total = wanted_bytes + sum(copy.size_bytes for copy in found)
        for _, size, path in sorted(found):
            if total <= self._limit_bytes:
                return
            if _COPY.fullmatch(path.name):
                path.unlink(missing_ok=True)
                total -= size

    @contextlib.contextmanager
    def _failures_end_it(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in _FULL
            self._end("the disk is full" if full else str(error.strerror or error))

    def _end(self, reason: str) -> None:
        if self._keeps:
            self._keeps = False
            _log.warning(
                "%s: no more copies of shards are kept here (%s, limit %s); existing ones "
                "are used, the rest is read from the cache each time",
                self.folder,
                reason,
                format_bytes(self._limit_bytes),
            )


def _lock(path: Path) -> BinaryIO:
    """Open a file and wait for its lock."""
    while True:
        # Unbuffered: a write that a full disk rejects must not be retried when the file is closed.
        file = cast("BinaryIO", path.open("ab", buffering=0))
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            file.close()
            raise
        if _is(path, file):
            return file
        file.close()  # Renamed or removed by the previous holder: this is no longer its name.


def _is(path: Path, file: BinaryIO) -> bool:
    """Whether an open file is the one that now has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _remove(path: Path, file: BinaryIO) -> None:
    with contextlib.suppress(OSError):
        if _is(path, file):
            path.unlink()


def _remove_if_abandoned(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        _remove(path, file)
