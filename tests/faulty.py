"""A file system that fails: calls that raise, answers that are lost, writes that are cut short.

It keeps its files in a folder of this machine, so that several processes share it. Registered with
fsspec as `faulty://`; each process draws its own faults.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

PROTOCOL = "faulty"


class FaultyFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """An object store over a folder: a put is atomic, and may be create-only."""

    protocol = PROTOCOL
    cachable = False
    root_marker = "/"
    # Set by `register` in each process.
    draw = random.Random(0)
    fail_rate = 0.0
    cut_rate = 0.0
    delay_s = 0.0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix(f"{PROTOCOL}://").rstrip("/") or "/"

    def _before(self) -> bool:
        """Perhaps raise; return whether to raise after the work (the answer is lost)."""
        time.sleep(self.delay_s)
        if self.draw.random() < self.fail_rate:
            if self.draw.random() < 0.5:
                raise ConnectionError("reset by peer")
            return True
        return False

    def _after(self, lost: bool) -> None:
        if lost:
            raise ConnectionError("the answer was lost")

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        self._after(self._before())
        with open(self._strip_protocol(path), "rb") as file:
            return file.read()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        lost = self._before()
        target = self._strip_protocol(path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        # What is cut short must be what readers check: a plan is read by others at once.
        whole = "/data/" not in target and "/shards/" not in target
        cut = not whole and self.draw.random() < self.cut_rate
        temporary = f"{target}.{uuid.uuid4().hex}.partial"
        with open(temporary, "xb") as file:
            file.write(value[: len(value) // 2] if cut else value)
        try:
            if mode == "create":
                os.link(temporary, target)
            else:
                os.replace(temporary, target)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
        self._after(lost)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self._after(self._before())
        folder = self._strip_protocol(path)
        entries = [self._entry(f"{folder}/{name}") for name in os.listdir(folder)]
        found = [entry for entry in entries if entry]
        return found if detail else [entry["name"] for entry in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self._after(self._before())
        entry = self._entry(self._strip_protocol(path))
        if not entry:
            raise FileNotFoundError(path)
        return entry

    def rm_file(self, path: str) -> None:
        lost = self._before()
        os.unlink(self._strip_protocol(path))
        self._after(lost)

    def _entry(self, path: str) -> dict[str, Any]:
        try:
            kind = "directory" if os.path.isdir(path) else "file"
            return {"name": path, "size": os.stat(path).st_size, "type": kind}
        except FileNotFoundError:  # removed since it was listed
            return {}


def register(*, fail_rate: float = 0.0, cut_rate: float = 0.0, delay_s: float = 0.0) -> None:
    """Make `faulty://` known to fsspec in this process."""
    FaultyFileSystem.draw = random.Random(os.getpid())
    FaultyFileSystem.fail_rate = fail_rate
    FaultyFileSystem.cut_rate = cut_rate
    FaultyFileSystem.delay_s = delay_s
    fsspec.register_implementation(PROTOCOL, FaultyFileSystem, clobber=True)
