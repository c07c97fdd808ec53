"""Checksums of files, and files that carry their own: XXH3-128 with zeros in its place."""

from __future__ import annotations

import xxhash

__all__ = ["CHECKSUM_PLACE", "checksum", "has_valid_checksum", "with_checksum"]

_MARK = b"xxh3-128:"
_ZEROS = b"0" * 32
CHECKSUM_PLACE = (_MARK + _ZEROS).decode()
"""Text that a file contains once before its checksum is filled in."""


def checksum(data: bytes) -> str:
    """Return XXH3-128 in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


def with_checksum(data: bytes) -> bytes:
    """Return the file with its checksum in the last place of `CHECKSUM_PLACE`."""
    at = _place(data)
    assert data[at : at + len(_ZEROS)] == _ZEROS
    return _with(data, at, checksum(data).encode())


def has_valid_checksum(data: bytes) -> bool:
    """Whether the file is the one whose checksum was filled in."""
    at = _place(data)
    return checksum(_with(data, at, _ZEROS)).encode() == data[at : at + len(_ZEROS)]


def _place(data: bytes) -> int:
    return data.rfind(_MARK) + len(_MARK)


def _with(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]
