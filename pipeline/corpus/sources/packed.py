"""Unpack .gz, .bz2, .xz and .zst: all members of a file, and an error where it is cut off."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import posixpath
import zlib
from collections.abc import Callable
from typing import IO, Any, cast

__all__ = ["DAMAGED", "PACKED", "unpacked"]

PACKED = (".gz", ".bz2", ".xz", ".zst")

DAMAGED = (EOFError, zlib.error, lzma.LZMAError, OSError)
"""What reading a packed file raises where it is cut off, or damaged, or not packed at all."""

_CHUNK = 1 << 16


def unpacked(stream: IO[bytes], name: str) -> IO[bytes]:
    """Return what a file holds, unpacked as the end of its `name` says; it cannot be rewound.

    Several members in one file (the parts of a parallel compressor, files joined with `cat`) are
    read as one. Reading raises one of `DAMAGED` where the file ends inside a member.
    """
    # Not fsspec's own: zstandard's reader ends without an error where a file is cut off, and
    # BZ2File and LZMAFile take a damaged second member for the end of the file.
    match posixpath.splitext(name.lower())[1]:
        case ".gz":
            return cast(IO[bytes], gzip.GzipFile(fileobj=stream, mode="rb"))
        case ".bz2":
            return io.BufferedReader(_Members(stream, bz2.BZ2Decompressor))
        case ".xz":
            return io.BufferedReader(_Members(stream, lzma.LZMADecompressor))
        case ".zst":
            import pyarrow as pa

            return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd"))
    return stream


class _Members(io.RawIOBase):
    """One member after the other, each with a decompressor of its own."""

    def __init__(self, stream: IO[bytes], new: Callable[[], Any]) -> None:
        self._stream = stream
        self._new = new
        self._current: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next(self, size: int) -> bytes:
        while True:
            packed = b""
            if self._current is None or self._current.eof:
                packed = self._current.unused_data if self._current is not None else b""
                packed = packed or self._stream.read(_CHUNK)
                if not packed:
                    return b""
                packed = packed.lstrip(b"\0")  # padding between members
                self._current = self._new() if packed else None
                if not packed:
                    continue
            elif self._current.needs_input:
                packed = self._stream.read(_CHUNK)
                if not packed:
                    raise EOFError("the file ends inside a compressed member")
            data: bytes = self._current.decompress(packed, size)
            if data:
                return data
