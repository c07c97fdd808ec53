"""One root folder on any fsspec file system, with atomic and create-only writes."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, TypeVar

from pipeline.config.secrets import PLAIN_ADDRESS, has_secret
from pipeline.errors import DistillError, StoreError
from pipeline.program import command_name
from pipeline.storage.faults import FULL, is_throttled, may_pass
from pipeline.storage.local import PARTIAL, write_local

__all__ = ["Store"]

T = TypeVar("T")

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
_BUDGET_S = 60.0
"""Seconds after which retries end: a rebooting switch, a failover of the metadata server or an
expired token recovers within a minute; a longer fault needs a person."""
_THROTTLED_BUDGET_S = 600.0
"""Seconds of retries while the store throttles requests: it works, and giving up would waste a
loaded teacher, while restarted workers would only add load."""
_DELETED_AT_ONCE = 1000
"""Files that S3 removes in one request at most."""
_SWEEPS = 3
"""Times in a row that our unfinished file may be removed by a worker that finishes."""


class Store:
    """Reads and writes complete files below one URL.

    Names are relative, with `/`. A write is atomic: locally by a temporary file that is synced and
    renamed, on object stores by the store's atomic put.
    """

    def __init__(self, url: str) -> None:
        """Open `url` (a path, or any fsspec URL); touches nothing.

        Raises:
            StoreError: the protocol is unknown, its driver is not installed, or the address holds a
                password or a key, which would be written wherever the address is.
        """
        import fsspec

        self.url = str(url)
        if has_secret(self.url):
            shown = self.url.partition("://")[0]
            raise StoreError(
                f"found an address of {shown}:// with a password or a key", expected=PLAIN_ADDRESS
            )
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"{url}: {error}", expected="a local path or a URL that fsspec can open"
            ) from None
        self.root = str(root).rstrip("/")
        self.is_local = "file" in _protocols(self._fs)
        # s3fs asks for the size of a file before it reads it, to fetch a large one in parts.
        self._one_request = {"max_concurrency": 1} if "s3" in _protocols(self._fs) else {}
        # On the hub a write is a commit, and none is create-only: no lease could hold there.
        self.read_only = "hf" in _protocols(self._fs)

    def __repr__(self) -> str:
        """Return the URL, for logs."""
        return f"Store({self.url!r})"

    @property
    def place(self) -> tuple[str, str]:
        """The file system and the folder with a `/` behind it, the same however it is spelt.

        Of a local folder links and `..` are resolved. Two stores share files where one's folder
        begins with the other's.
        """
        root = os.path.realpath(self.root or "/") if self.is_local else self.root
        return _protocols(self._fs)[0], f"{root.rstrip('/')}/"

    def path(self, name: str) -> str:
        """Return the full path of `name` on its file system."""
        return f"{self.root}/{name}" if name else self.root

    def full_url(self, name: str) -> str:
        """Return a URL of `name` that other tools can open."""
        return f"{self.url.rstrip('/')}/{name}" if name else self.url

    def exists(self, name: str) -> bool:
        """Whether the file or folder exists now (no stale listing)."""
        self._fs.invalidate_cache()
        return bool(self._try(f"look for {name}", lambda: self._fs.exists(self.path(name))))

    def size(self, name: str) -> int | None:
        """Return the size in bytes, or None where there is no such file."""
        self._fs.invalidate_cache()
        try:
            return int(self._try(f"look at {name}", lambda: self._fs.size(self.path(name))))
        except FileNotFoundError:
            return None

    def folders(self, folder: str) -> Sequence[str]:
        """Return the sorted names of the folders directly below `folder`; empty when missing."""

        def call() -> dict[str, int]:
            found = self._fs.ls(self.path(folder), detail=True)
            names = (str(i["name"]) for i in found if i["type"] == "directory")
            return dict.fromkeys((name.rstrip("/").rsplit("/", 1)[-1] for name in names), 0)

        return sorted(self._listed(folder, call))

    def list(self, folder: str) -> list[str]:
        """Return the sorted names of the files directly below `folder`; empty when missing."""
        return sorted(self._listed(folder, lambda: dict.fromkeys(self._names(folder), 0)))

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size of each file directly below `folder`, from one listing of it."""
        return self._listed(folder, lambda: self._sizes(folder))

    def read(self, name: str, *, large: bool = False) -> bytes:
        """Return the content of a file.

        Args:
            name: relative to the root.
            large: fetch parts side by side where the store can, for which it asks for the size
                first; else it is one request.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: the store fails.
        """
        options = {} if large else self._one_request
        data: bytes = self._try(
            f"read {name}", lambda: self._fs.cat_file(self.path(name), **options)
        )
        return data

    def open(self, name: str) -> BinaryIO:
        """Open a file to read places of it; of a remote one only these are fetched.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: the store fails.
        """
        file: BinaryIO = self._try(
            f"open {name}", lambda: self._fs.open(self.path(name), "rb", cache_type="none")
        )
        return file

    def write(self, name: str, data: bytes, *, once: bool = False, look_back: bool = True) -> None:
        """Write a file, replacing another of that name; atomic.

        Args:
            name: relative to the root.
            data: the whole content.
            once: a single attempt, neither synced nor checked; for files that are soon rewritten.
            look_back: ask what has arrived; needless for a file with its own checksum.
        """
        action = f"write {name}"
        self._require_writable(action)
        try:
            if self.is_local:
                self._try(
                    action,
                    lambda: write_local(self.path(name), data, replace=True, sync=not once),
                    once=once,
                )
            else:
                self._try(
                    action, lambda: self._put(name, data, verify=look_back and not once), once=once
                )
        except FileNotFoundError as error:  # of the bucket, not of the file
            raise self._translated(action, error) from error

    def create(self, name: str, data: bytes, *, sync: bool = True) -> bool:
        """Write the file unless one of that name exists; atomic. Return whether it was written.

        `sync=False` is for files that need survive neither a power cut nor a truncated write of an
        object store. A partial file is never visible otherwise. If the store fails after it has
        written (a lost answer), the content decides whose file it is: callers that must know the
        winner have to write different content.
        """
        action = f"create {name}"
        self._require_writable(action)
        tries = 0

        def call() -> None:
            nonlocal tries
            tries += 1
            if self.is_local:
                write_local(self.path(name), data, replace=False, sync=sync)
            else:
                self._fs.pipe_file(self.path(name), data, mode="create")

        try:
            self._try(action, call)
        except FileExistsError:
            return tries > 1 and self._holds(name, data)
        except FileNotFoundError as error:  # of the bucket, not of the file
            raise self._translated(action, error) from error
        if sync and not self.is_local and (self.size(name) or len(data)) < len(data):
            self.write(name, data)  # ours, but incomplete
        return True

    def delete(self, name: str) -> None:
        """Remove the file; no error if it does not exist."""
        self._require_writable(f"delete {name}")
        try:
            self._try(f"delete {name}", lambda: self._fs.rm_file(self.path(name)))
        except FileNotFoundError:
            return

    def delete_all(self, names: Sequence[str]) -> None:
        """Remove files, on object stores many in one request; no error if one does not exist."""
        if not self.is_local:
            for start in range(0, len(names), _DELETED_AT_ONCE):
                paths = [self.path(name) for name in names[start : start + _DELETED_AT_ONCE]]
                try:
                    self._try(f"delete {len(paths)} files", lambda paths=paths: self._fs.rm(paths))  # type: ignore[misc]
                except FileNotFoundError:
                    break  # by a store that minds: one after the other
            else:
                return
        for name in names:
            self.delete(name)

    def remove_folder(self, folder: str, *, above: int = 0) -> None:
        """Remove a local folder that is empty, and so many empty ones above it; else do nothing."""
        if not self.is_local:
            return
        path = self.path(folder).rstrip("/")
        for _ in range(above + 1):
            try:
                os.rmdir(path)
            except OSError:
                return
            path = os.path.dirname(path)

    def remove_partials(self, folders: Iterable[str]) -> int:
        """Remove unfinished files of killed writers directly below `folders`; return their number.

        A live writer whose unfinished file is removed writes it again.
        """
        removed = 0
        for folder in folders:
            self._fs.invalidate_cache()
            try:
                found = self._try(
                    f"list {folder}",
                    lambda folder=folder: self._fs.ls(self.path(folder), detail=False),  # type: ignore[misc]
                )
            except FileNotFoundError:
                continue
            for name in (str(path).rsplit("/", 1)[-1] for path in found):
                if name.endswith(PARTIAL):
                    self.delete(f"{folder}/{name}" if folder else name)
                    removed += 1
        return removed

    def free_bytes(self) -> int | None:
        """Return the free space in bytes of a local file system, None where it is not bounded."""
        if not self.is_local:
            return None
        folder = self.root
        while folder and not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        return shutil.disk_usage(folder or "/").free

    def _require_writable(self, action: str) -> None:
        if self.read_only:
            raise StoreError(
                f"{self.url}: cannot {action}: the hub is read in place, not written in place",
                expected="a folder, or an address of a store such as s3://",
                do=f"write there, then publish with {command_name('pipeline.cache')} push",
            )

    def _listed(self, folder: str, call: Callable[[], dict[str, int]]) -> dict[str, int]:
        self._fs.invalidate_cache()
        try:
            found = self._try(f"list {folder}", call)
        except FileNotFoundError:
            return {}
        return {name: found[name] for name in found if name and not name.endswith(PARTIAL)}

    def _names(self, folder: str) -> Sequence[str]:
        if self.is_local:
            # fsspec's listing reads every file's size: 20 times slower with 5,000 files.
            with os.scandir(self.path(folder)) as entries:
                return [entry.name for entry in entries if entry.is_file()]
        found = self._fs.ls(self.path(folder), detail=True)
        return [str(i["name"]).rsplit("/", 1)[-1] for i in found if i["type"] == "file"]

    def _sizes(self, folder: str) -> dict[str, int]:
        if self.is_local:
            sizes: dict[str, int] = {}
            with os.scandir(self.path(folder)) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                        if entry.is_file():
                            sizes[entry.name] = entry.stat().st_size
            return sizes
        found = [i for i in self._fs.ls(self.path(folder), detail=True) if i["type"] == "file"]
        return {str(i["name"]).rsplit("/", 1)[-1]: int(i["size"]) for i in found}

    def _holds(self, name: str, data: bytes) -> bool:
        try:
            return self.read(name) == data
        except FileNotFoundError:
            return False

    def _put(self, name: str, data: bytes, *, verify: bool) -> None:
        self._fs.pipe_file(self.path(name), data)
        if verify:
            self._fs.invalidate_cache()
            try:
                size = int(self._fs.size(self.path(name)))
            except FileNotFoundError:
                size = 0
            if size != len(data):
                raise OSError(errno.EIO, f"{size} of {len(data)} bytes have arrived")

    def _try(self, action: str, call: Callable[[], T], *, once: bool = False) -> T:
        """Run `call`; retry with growing pauses after transient failures of the store.

        The pauses double up to a bound, with random jitter between half and all of a pause, so that
        workers that failed together do not retry together.
        """
        pause = _FIRST_PAUSE_S
        spent = 0.0
        swept = 0
        while True:
            started = time.monotonic()
            try:
                return call()
            except (FileNotFoundError, FileExistsError, DistillError) as error:
                swept += self._swept_away(error)
                if not self._swept_away(error) or swept > _SWEEPS:
                    raise
                continue
            except Exception as error:
                spent += time.monotonic() - started
                budget = _THROTTLED_BUDGET_S if is_throttled(error) else _BUDGET_S
                if once or not may_pass(error, local=self.is_local) or spent + pause > budget:
                    raise self._translated(action, error) from error
            jittered = pause * random.uniform(0.5, 1.0)
            time.sleep(jittered)
            spent += jittered
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _swept_away(self, error: Exception) -> bool:
        """Whether a finishing worker removed our unfinished file with those of killed writers."""
        return (
            self.is_local
            and isinstance(error, FileNotFoundError)
            and str(error.filename).endswith(PARTIAL)
        )

    def _translated(self, action: str, error: Exception) -> StoreError:
        if isinstance(error, OSError) and error.errno in FULL:
            return StoreError(
                f"{self.url}: the disk is full (cannot {action})",
                do="free some space and run the same command again; it goes on where it stopped",
            )
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        return StoreError(
            f"{self.url}: cannot {action} ({reason})",
            do="check the address, the mount and the rights, then run the same command again",
        )


def _protocols(fs: Any) -> tuple[str, ...]:
    protocol = fs.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
