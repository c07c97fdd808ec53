"""Which shards an interrupted `verify` had compared, in a file of this machine."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.names import parse_shard, shard_label

__all__ = ["VerifyState"]

_GOOD_FOR_S = 24 * 3600.0
"""An older file says nothing of the disk as it is now."""


class VerifyState:
    """The shards that were found intact, one a line; removed when a run comes to its end.

    Beside the cache it would need the right to write there, which who verifies may lack. If it
    cannot be written here either, an interrupted run starts again.
    """

    def __init__(self, *key: str) -> None:
        """Read what is there for this key: address, content and check."""
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        name = checksum("\n".join(key).encode())
        self._path = Path(home) / "distill" / f"verify-{name}.txt"
        self.intact: frozenset[tuple[str, int]] = frozenset()
        with contextlib.suppress(OSError):
            if time.time() - self._path.stat().st_mtime < _GOOD_FOR_S:
                lines = self._path.read_text(encoding="ascii").split("\n")
                # What a killed process was writing has no end of line.
                found = (parse_shard(line) for line in lines[:-1])
                self.intact = frozenset(key for key in found if key is not None)
            else:
                self._path.unlink()

    def add(self, shards: Iterable[tuple[str, int]]) -> None:
        """Remember that these are intact."""
        text = "".join(f"{shard_label(*key)}\n" for key in shards)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="ascii") as file:
                file.write(text)

    def end(self) -> None:
        """Forget: the run has come to its end."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
