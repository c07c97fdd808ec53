"""An object store in memory whose requests take no longer when it holds more files.

fsspec's own looks through all names for the size of one. Registered with fsspec as `flat://`.
"""

from __future__ import annotations

import io
from collections import defaultdict
from typing import Any, ClassVar

import fsspec
from fsspec import AbstractFileSystem

PROTOCOL = "flat"


class FlatMemory(AbstractFileSystem):  # type: ignore[misc]
    """Files by folder and name, shared by all instances of the process."""

    protocol = PROTOCOL
    cachable = False
    root_marker = "/"
    folders: ClassVar[defaultdict[str, dict[str, bytes]]] = defaultdict(dict)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix(f"{PROTOCOL}://").strip("/")

    def _place(self, path: str) -> tuple[dict[str, bytes], str]:
        folder, _, name = self._strip_protocol(path).rpartition("/")
        return self.folders[folder], name

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        folder, name = self._place(path)
        if name not in folder:
            raise FileNotFoundError(path)
        return folder[name]

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return io.BytesIO(self.cat_file(path))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        folder, name = self._place(path)
        if mode == "create" and name in folder:
            raise FileExistsError(path)
        folder[name] = value

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        root = self._strip_protocol(path)
        if root not in self.folders:
            raise FileNotFoundError(path)
        return [
            {"name": f"{root}/{name}", "size": len(data), "type": "file"} if detail else name
            for name, data in self.folders[root].items()
        ]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": len(self.cat_file(path)), "type": "file"}

    def rm_file(self, path: str) -> None:
        folder, name = self._place(path)
        if folder.pop(name, None) is None:
            raise FileNotFoundError(path)

    def rm(self, path: Any, recursive: bool = False, maxdepth: Any = None) -> None:
        for one in [path] if isinstance(path, str) else path:
            folder, name = self._place(one)
            folder.pop(name, None)
            below = self._strip_protocol(one)
            for root in list(self.folders) if recursive else ():
                if root == below or root.startswith(f"{below}/"):
                    del self.folders[root]


def register() -> None:
    """Make `flat://` known to fsspec in this process."""
    fsspec.register_implementation(PROTOCOL, FlatMemory, clobber=True)
