"""A folder of one owner at a time: kept by a heartbeat, taken over from an owner that stands still.

The lock is a file in the folder, which its owner rewrites with a rising counter. On the owner's own
machine the kernel's lock of that file says whether the owner lives, so what a killed process leaves
is free at once. Elsewhere a taker must have *watched* the file stand still for `stale_s` by its own
clock: no clocks of two machines are compared, no file times are trusted, and no process number
means anything on another machine. Nothing depends on locks that reach across machines (which Lustre
without `flock` and some NFS lack).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import StoreError

__all__ = ["BEAT_S", "STALE_S", "FolderLock", "leave_at_once"]

_log = logging.getLogger(__name__)
BEAT_S = 5.0
STALE_S = 60.0
"""Twelve beats: a metadata server that fails over takes most of a minute."""
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)


def leave_at_once() -> None:
    """End this process without another write: the folder is somebody else's by now."""
    os._exit(StoreError.exit_code)


@dataclass(slots=True)
class _Watched:
    """The record of another machine's owner as last seen, and for how long it has stood still."""

    content: bytes
    looked: float
    still_s: float = 0.0


class FolderLock:
    """Holds a folder for one process.

    Args:
        folder: is made where it is missing.
        name: of the lock's file in it.
        beat_s: seconds between two beats.
        stale_s: seconds without a beat after which an owner on another machine counts as dead.
        lost: called on the heartbeat's thread where another owner has taken the folder.
        clock: seconds, for tests.

    Raises:
        StoreError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        beat_s: float = BEAT_S,
        stale_s: float = STALE_S,
        lost: Callable[[], None] = leave_at_once,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Hold nothing yet."""
        self.folder = folder
        self._path = folder / name
        self._beat_s, self._stale_s = beat_s, stale_s
        self._lost, self._clock = lost, clock
        self._owner = uuid.uuid4().hex
        self._pid = os.getpid()
        self._count = 0
        self._watched: _Watched | None = None
        self._sure = False  # that a living process of this machine has it
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.handle: int | None = None
        """Of the open file while the lock is held; a child that inherits it keeps it locked."""
        itself = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(itself))

    def try_take(self) -> bool:
        """Take the folder if nobody has it; else say false, and look again at the next call."""
        handle, is_new = self._open()
        try:
            alone = _flock(handle)
            if is_new and alone is False:
                alone = _flock_soon(handle)  # somebody has a look at our new file
            if not self._is_current(handle):
                return False  # its owner has just let go: the next call opens the new file
            content = os.pread(handle, 4096, 0)
            record = _parse(content)
            here = record.get("machine") == _machine()
            self._sure = here and alone is False
            over = not is_new and not (here and alone is True)
            if over and (self._sure or not self._stands_still(content)):
                return False
            self.handle, handle = handle, -1
            self._write()
        finally:
            if handle >= 0:
                os.close(handle)
        if over:
            # Another machine may have watched the same owner: the last to write has the folder.
            time.sleep(self._beat_s)
            if self.owner_record().get("owner") != self._owner:
                self._close()
                return False
            _log.warning("%s: taken over from %s, which stood still", self.folder, _shown(record))
        self._start()
        return True

    def take(self, *, doing: str = "uses") -> FolderLock:
        """Take the folder, waiting only where its owner may be dead.

        Args:
            doing: what an owner does with the folder, for the message.

        Raises:
            StoreError: a living process has it.
        """
        first: dict[str, Any] = {}
        while not self.try_take():
            record = self.owner_record()
            if not first and record:
                first = record
                if not self._sure:
                    _log.info(
                        "%s was held by %s; waiting up to %.0f s for a sign of it",
                        self.folder, _shown(record), self._stale_s,
                    )  # fmt: skip
            if record and (self._sure or record != first):
                raise StoreError(
                    f"{self.folder}: {_shown(record)} {doing} it",
                    expected="a folder that no other process writes",
                    do="wait for that run or end it, or choose another folder",
                )
            time.sleep(self._beat_s / 5)
        return self

    def owner_record(self) -> dict[str, Any]:
        """Return what the lock's file says of its owner; empty where nobody has it."""
        try:
            return _parse(self._path.read_bytes())
        except OSError:
            return {}

    def holder(self) -> str:
        """Return the owner in words: `process 12 on node-a`."""
        return _shown(self.owner_record())

    def hand_to(self, pid: int) -> None:
        """Leave the lock to a child that has inherited `handle`; end with it, not with us."""
        self._end_beats()
        self._pid = pid
        self._write()
        self._close()

    def release(self) -> None:
        """Let go, and remove the file."""
        self._end_beats()
        if self.handle is not None:
            with contextlib.suppress(OSError):
                if self._is_current(self.handle):
                    self._path.unlink()
            self._close()

    def __enter__(self) -> FolderLock:
        """Hold what `take` has taken."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go."""
        self.release()

    def _open(self) -> tuple[int, bool]:
        """Open the lock's file, and say whether it is new."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
            except FileExistsError:
                return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), False
        except OSError as error:
            raise StoreError(
                f"{self._path}: cannot be written ({error.strerror})",
                expected="a folder that can be made and written",
            ) from error

    def _is_current(self, handle: int) -> bool:
        """Whether the open file is still the one of that name."""
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _stands_still(self, content: bytes) -> bool:
        now, seen = self._clock(), self._watched
        if seen is None or seen.content != content:
            self._watched = _Watched(content, now)
            return False
        # A look that hung in the file system says nothing of the owner, who hung there too.
        seen.still_s += min(now - seen.looked, 2 * self._beat_s)
        seen.looked = now
        return seen.still_s >= self._stale_s

    def _write(self) -> None:
        assert self.handle is not None
        self._count += 1
        record = {
            "owner": self._owner, "machine": _machine(), "host": socket.gethostname(),
            "pid": self._pid, "beat": self._count,
        }  # fmt: skip
        data = json.dumps(record).encode()
        os.pwrite(self.handle, data, 0)
        os.ftruncate(self.handle, len(data))
        with contextlib.suppress(OSError):
            os.fsync(self.handle)

    def _start(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="folder-lock", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(self._beat_s):
            try:
                record = _parse(self._path.read_bytes())
            except FileNotFoundError:
                record = {}
            except OSError:
                continue  # a file system that fails in passing fails for the others too
            if record and record.get("owner") != self._owner:
                _log.error("%s: %s has taken it over; ending", self.folder, _shown(record))
                self._lost()
                return
            with contextlib.suppress(OSError):
                self._write()

    def _end_beats(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(3.0)  # a beat may hang in the file system; the thread is a daemon
            self._thread = None

    def _close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            os.close(handle)


def _forget(lock: weakref.ref[FolderLock]) -> None:
    """Close the handle in a forked child: only one that it is passed to keeps the folder."""
    found = lock()
    if found is not None:
        found._close()


def _flock_soon(handle: int) -> bool | None:
    """Lock the file that a passer-by has locked for its look."""
    for _ in range(100):
        time.sleep(0.02)
        alone = _flock(handle)
        if alone is not False:
            return alone
    return False


def _flock(handle: int) -> bool | None:
    """Lock an open file; false where another has it, None where the file system cannot."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None
    return True


def _machine() -> str:
    """Name of this boot of this machine: a pod on another node may have the same hostname."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _parse(content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _shown(record: dict[str, Any]) -> str:
    if not record:
        return "another process"
    return f"process {record.get('pid', '?')} on {record.get('host', 'an unknown host')}"
