"""The nearest right names, for messages about a name that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["beside", "did_you_mean", "nearest"]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is nearest in any case, or an empty string."""
    by_key = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), list(by_key), n=1, cutoff=0.6)
    return by_key[close[0]] if close else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "did you mean X?" for the nearest of the known names, or an empty string."""
    near = nearest(name, known)
    return f"did you mean {near}?" if near else ""


def beside(path: str) -> list[str]:
    """Return what stands beside a local path that is not there, each as the path was written."""
    given = Path(path)
    with suppress(OSError):
        return [str(given.with_name(found.name)) for found in given.expanduser().parent.iterdir()]
    return []
