"""Files that carry their own checksum: XXH3-128 of the file with zeros in the checksum's place."""

from __future__ import annotations

from pipeline.cache.layout.manifest import checksum

__all__ = ["OPEN_SEAL", "is_sealed", "seal"]

_MARK = b"xxh3-128:"
_ZEROS = b"0" * 32
OPEN_SEAL = (_MARK + _ZEROS).decode()
"""Text that a file holds once before it is sealed."""


def seal(data: bytes) -> bytes:
    """Return the file with its checksum in the last place of `OPEN_SEAL`."""
    at = _place(data)
    assert data[at : at + len(_ZEROS)] == _ZEROS
    return _with(data, at, checksum(data).encode())


def is_sealed(data: bytes) -> bool:
    """Whether the file is the one that was sealed."""
    at = _place(data)
    return checksum(_with(data, at, _ZEROS)).encode() == data[at : at + len(_ZEROS)]


def _place(data: bytes) -> int:
    return data.rfind(_MARK) + len(_MARK)


def _with(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]
