"""Values that JSON cannot hold, JSON with such values, and how messages call a value."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from typing import Any

__all__ = ["JSON", "Unfit", "described", "is_unicode", "kind_of_fault"]

_TIMES = (datetime.date, datetime.time, datetime.timedelta)


class Unfit:
    """In the place of a value that a reader could not read; who needs it refuses its row."""

    __slots__ = ("kind", "what")

    def __init__(self, what: str, kind: str = "not JSON data") -> None:
        """`what` describes the value, as in `a map with the key 'a' twice`."""
        self.what = what
        self.kind = kind

    def __repr__(self) -> str:
        """Return what it describes: messages quote the values around it."""
        return self.what


def described(value: object) -> str:
    """Return what a value is, for messages."""
    if isinstance(value, Unfit):
        return value.what
    if isinstance(value, _TIMES):
        # JSON readers guess dates from text.
        return f"a date or time ({type(value).__name__}), which the file's types made of it"
    return type(value).__name__


def kind_of_fault(value: object, otherwise: str) -> str:
    """Return the kind of `BadRow` that a value of the wrong type makes: the reader's own first."""
    return value.kind if isinstance(value, Unfit) else otherwise


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text: JSON can spell half of a surrogate pair, which it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> Any:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
    return Unfit(f"an object with the key {key!r} twice")


JSON = json.JSONDecoder(object_pairs_hook=_object)
"""Reads JSON; `Unfit` takes the place of an object that has a key twice, where others lose one."""
