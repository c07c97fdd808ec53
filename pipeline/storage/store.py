"""One root folder on any fsspec file system, with atomic and create-only writes."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.errors import DistillError, StoreError

__all__ = ["Store"]

T = TypeVar("T")

_ATTEMPTS = 4
_BACKOFF_S = 0.5
# Answers of the store, not failures of the way to it: trying again would only repeat them.
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PARTIAL = ".partial"


class Store:
    """Reads and writes whole files below one URL.

    Names are relative, with `/`. A write appears whole or not at all: locally through a temporary
    file that is synced and renamed, on object stores through the store's own atomic put.
    """

    def __init__(self, url: str) -> None:
        """Open `url` (a path, or any fsspec URL); touches nothing.

        Raises:
            StoreError: the protocol is unknown or its driver is not installed.
        """
        import fsspec

        self.url = str(url)
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"{url}: {error}", expected="a local path or a URL that fsspec can open"
            ) from None
        self.root = str(root).rstrip("/")
        self.is_local = "file" in _protocols(self._fs)

    def __repr__(self) -> str:
        """Show the URL in logs."""
        return f"Store({self.url!r})"

    def path(self, name: str) -> str:
        """Return the full path of `name` on its file system."""
        return f"{self.root}/{name}" if name else self.root

    def full_url(self, name: str) -> str:
        """Return a URL of `name` that a user can open with other tools."""
        return f"{self.url.rstrip('/')}/{name}" if name else self.url

    def exists(self, name: str) -> bool:
        """Whether the file or folder is there now (no stale listing)."""
        self._fs.invalidate_cache()
        return bool(self._try(f"look for {name}", lambda: self._fs.exists(self.path(name))))

    def size(self, name: str) -> int | None:
        """Return the size in bytes, or None where there is no such file."""
        self._fs.invalidate_cache()
        try:
            return int(self._try(f"look at {name}", lambda: self._fs.size(self.path(name))))
        except FileNotFoundError:
            return None

    def list(self, folder: str) -> list[str]:
        """Return the sorted names of the files directly below `folder`; empty when missing."""
        self._fs.invalidate_cache()
        try:
            found = self._try(f"list {folder}", lambda: self._fs.ls(self.path(folder), detail=True))
        except FileNotFoundError:
            return []
        files = (str(item["name"]) for item in found if item["type"] == "file")
        names = (name.rsplit("/", 1)[-1] for name in files)
        return sorted(name for name in names if name and not name.endswith(_PARTIAL))

    def read(self, name: str) -> bytes:
        """Return the whole file.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: the store fails.
        """
        data: bytes = self._try(f"read {name}", lambda: self._fs.cat_file(self.path(name)))
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write the whole file, replacing another of that name; atomic."""
        action = f"write {name}"
        try:
            if self.is_local:
                self._try(action, lambda: self._write_local(name, data, replace=True))
            else:
                self._try(action, lambda: self._fs.pipe_file(self.path(name), data))
        except FileNotFoundError as error:  # of the bucket, not of the file
            raise self._translated(action, error) from error

    def create(self, name: str, data: bytes) -> bool:
        """Write the file unless one of that name exists; atomic. Return whether it was written."""
        action = f"create {name}"
        try:
            if self.is_local:
                self._try(action, lambda: self._write_local(name, data, replace=False))
            else:
                self._try(action, lambda: self._fs.pipe_file(self.path(name), data, mode="create"))
        except FileExistsError:
            return False
        except FileNotFoundError as error:  # of the bucket, not of the file
            raise self._translated(action, error) from error
        return True

    def delete(self, name: str) -> None:
        """Remove the file; no error where it is gone already."""
        try:
            self._try(f"delete {name}", lambda: self._fs.rm_file(self.path(name)))
        except FileNotFoundError:
            return

    def free_bytes(self) -> int | None:
        """Return the free space in bytes of a local file system, None where it has no bound."""
        if not self.is_local:
            return None
        folder = self.root
        while folder and not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        return shutil.disk_usage(folder or "/").free

    def _write_local(self, name: str, data: bytes, *, replace: bool) -> None:
        target = self.path(name)
        folder = os.path.dirname(target)
        try:
            os.makedirs(folder, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file, not a folder") from None
        # The name never ends in .parquet: globs of other readers must not find unfinished files.
        temporary = f"{target}.{uuid.uuid4().hex}{_PARTIAL}"
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                os.replace(temporary, target)
            else:
                os.link(temporary, target)  # fails when the target exists, on NFS and Lustre too
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
        _sync_folder(folder)

    def _try(self, action: str, call: Callable[[], T]) -> T:
        """Run `call`, again with growing pauses where a remote store fails in passing."""
        attempts = 1 if self.is_local else _ATTEMPTS
        for attempt in range(1, attempts + 1):
            try:
                return call()
            except (FileNotFoundError, FileExistsError, DistillError):
                raise
            except Exception as error:
                if attempt < attempts and not isinstance(error, _FINAL):
                    time.sleep(_BACKOFF_S * 2 ** (attempt - 1))
                    continue
                raise self._translated(action, error) from error
        raise AssertionError("unreachable")

    def _translated(self, action: str, error: Exception) -> StoreError:
        if isinstance(error, OSError) and error.errno in _FULL:
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


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse to sync a folder; the rename itself is atomic
    finally:
        os.close(descriptor)
