"""Bytes kept out of memory: an append-only local file without a name."""

from __future__ import annotations

import errno
import os
import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.amounts import format_bytes
from pipeline.errors import ResourceError

__all__ = ["ScratchFile"]

_BUFFER_BYTES = 1 << 18
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ScratchFile:
    """Written once, sequentially, then read at any place, from any thread.

    It is in the system's folder for temporary files (`TMPDIR`) and has no name there: the kernel
    frees it when the process ends, even by SIGKILL. It is read with `pread`, not mapped: mapped
    pages count as the process's memory.
    """

    def __init__(self, what: str, *, buffer_bytes: int = _BUFFER_BYTES) -> None:
        """Open the file.

        Args:
            what: a name of the content, for messages.
            buffer_bytes: size of the write buffer.

        Raises:
            ResourceError: there is no folder for temporary files that can be written to.
        """
        self._what = what
        self._buffer_bytes = buffer_bytes
        self._buffer = bytearray()
        self._written = 0
        try:
            # Kept so that the descriptor lives as long as this object.
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._refused(error) from error

    @property
    def size(self) -> int:
        """Bytes appended so far."""
        return self._written + len(self._buffer)

    def append(self, data: bytes) -> int:
        """Append bytes and return their offset.

        Raises:
            ResourceError: the disk is full.
        """
        offset = self.size
        self._buffer += data
        if len(self._buffer) >= self._buffer_bytes:
            self.flush()
        return offset

    def flush(self) -> None:
        """Write the buffer; only written bytes can be read.

        Raises:
            ResourceError: the disk is full.
        """
        view = memoryview(self._buffer)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], self._written + done)
        except OSError as error:
            raise self._refused(error) from error
        finally:
            view.release()
        self._written += done
        self._buffer = bytearray()

    def read_into(self, target: NDArray[Any], offset: int) -> None:
        """Fill a contiguous array with the bytes from `offset` on.

        Raises:
            ResourceError: the disk fails.
        """
        view = target.reshape(-1).view(np.uint8).data
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
                if not count:
                    raise OSError(errno.EIO, f"ends at byte {offset + done}")
                done += count
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> ResourceError:
        try:
            folder = tempfile.gettempdir()
        except OSError:
            folder = os.environ.get("TMPDIR", "/tmp")
        if error.errno in _FULL:
            return ResourceError(
                f"the scratch disk is full: {format_bytes(self._written)} of {self._what} are in "
                f"{folder}, no more fits",
                do="free some space there, or set TMPDIR to a folder on a larger disk, and run the "
                "same command again",
            )
        return ResourceError(
            f"{folder}: {self._what} cannot be kept there ({error.strerror or error})",
            expected="a local folder for temporary files",
            do="set TMPDIR to one",
        )
