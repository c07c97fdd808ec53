"""Where a machine keeps what can be made again: copies of shards, lengths of rows."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["local_folder"]


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
