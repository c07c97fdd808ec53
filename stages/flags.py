"""Flags that a launcher takes for itself, before a stage reads the rest."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["take_flag"]


def take_flag(arguments: Sequence[str], name: str) -> tuple[list[str], str | None]:
    """Return the arguments without a flag, and its value; None where it is not there."""
    rest, value = list[str](), None
    queue = list(arguments)
    while queue:
        token = queue.pop(0)
        flag, given, text = token.partition("=")
        if flag != name:
            rest.append(token)
        else:
            value = text if given else queue.pop(0) if queue else ""
    return rest, value
