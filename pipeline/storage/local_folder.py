"""Where a machine keeps what can be made again: copies of shards, lengths of rows."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["local_folder", "locked", "remove_old"]

_KEPT_S = 30 * 24 * 3600.0


def local_folder(kind: str) -> Path | None:
    """Return a folder of this user for files of a kind, made if need be; None: there is none.

    Below XDG_CACHE_HOME where that is set, else below the system's temporary folder, which is on a
    local disk more often than a home. Nobody else may write there: another user could have made
    the folder before.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    base = (
        Path(root) / "distill" if root else Path(tempfile.gettempdir()) / f"distill-{os.getuid()}"
    )
    folder = base / kind
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        ours = all(part.stat().st_uid == os.getuid() for part in (base, folder))
    except OSError:
        return None
    return folder if ours and os.access(folder, os.W_OK) else None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among the processes of this machine, which ends with its process, even if killed.

    One of them makes what the others wait for. The file stays: it is empty, and one that is removed
    would no longer exclude.

    Raises:
        OSError: the file cannot be made.
    """
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_old(folder: Path, *patterns: str) -> None:
    """Remove files that nobody has touched for 30 days; who has one mapped keeps it.

    Whoever uses a file touches it. Locks stay, see `locked`.
    """
    for file in (found for pattern in patterns for found in folder.glob(pattern)):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > _KEPT_S:
                file.unlink()
