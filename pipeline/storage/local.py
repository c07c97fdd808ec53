"""Whole files on a local or mounted file system: atomic, and created for one writer only."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path

from pipeline.errors import StoreError

__all__ = ["PARTIAL", "require_writable", "write_local"]

PARTIAL = ".partial"
"""How unfinished files end: never in .parquet, so that globs of other readers do not find them."""


def write_local(target: str, data: bytes, *, replace: bool, sync: bool) -> None:
    """Write a file so that it is there as a whole or not at all.

    Args:
        target: its path; missing folders are made.
        data: the whole content.
        replace: take the place of another file of that name.
        sync: make it survive a power cut.

    Raises:
        FileExistsError: the name is taken, and nothing is to be replaced.
        OSError: the file system refuses.
    """
    folder = os.path.dirname(target)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file, not a folder") from None
    if not replace and os.path.lexists(target):
        raise FileExistsError(target)  # avoids writing a synced file for a lease that is taken
    temporary = f"{target}.{uuid.uuid4().hex}{PARTIAL}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        if size != len(data):
            raise OSError(errno.EIO, f"{size} of {len(data)} bytes have arrived")
        if replace:
            os.replace(temporary, target)
        else:
            _link(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    if sync:
        _sync_folder(folder)


def _link(temporary: str, target: str) -> None:
    """Rename the file unless the name is taken; also on NFS and Lustre."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        # NFS repeats a call whose answer was lost and then finds its own link: a link count of two.
        if os.stat(temporary).st_nlink != 2:
            raise


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot sync a folder; the rename itself is atomic
    finally:
        os.close(descriptor)


def require_writable(folder: Path, setting: str) -> None:
    """Reject a folder that can neither be made nor written.

    Args:
        folder: there or not.
        setting: whose value it is, for the message.

    Raises:
        StoreError: it, or what it would be made in, is a file or not to be written.
    """
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    reason = ""
    if not place.is_dir():
        reason = f"{place} is a file"
    elif not os.access(place, os.W_OK | os.X_OK):
        reason = f"{place} cannot be written"
    if reason:
        raise StoreError(
            f"{setting}: found {folder}, but {reason}",
            expected="a folder that can be made and written",
            do=f"choose another --{setting.rsplit('.', 1)[-1]}",
        )
