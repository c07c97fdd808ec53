"""Which rows a preview shows: numbers, ranges, and the first rows with which something is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.config.nearest import did_you_mean
from pipeline.errors import ConfigError

__all__ = ["KINDS", "RowChoice", "choose_rows"]

KINDS = {
    "truncated": "rows that are cut at max_length",
    "quarantined": "rows that cannot be used",
    "dropped": "rows without a supervised token, or too long to be used",
    "heldout": "rows that are held out",
    "longest": "the rows with the most tokens",
}
_RANGE = re.compile(r"(\d*):(\d+)")
_MOST = 1000


@dataclass(frozen=True, slots=True)
class RowChoice:
    """Rows by number, and how many of each kind."""

    numbers: frozenset[int]
    kinds: dict[str, int]

    @property
    def last(self) -> int:
        """One more than the highest number; 0 without any."""
        return max(self.numbers, default=-1) + 1


def choose_rows(text: str) -> RowChoice:
    """Read a choice such as `0:3,17,truncated,quarantined:2`.

    Raises:
        ConfigError: with every part that is none.
    """
    numbers: set[int] = set()
    kinds: dict[str, int] = {}
    mistakes = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, count = part.partition(":")
        span = _RANGE.fullmatch(part)
        if part.isdecimal():
            numbers.add(int(part))
        elif span is not None:
            numbers.update(range(int(span[1] or 0), min(int(span[2]), int(span[1] or 0) + _MOST)))
        elif name in KINDS and (count.isdecimal() or part == name):
            kinds[name] = min(int(count or 1), _MOST)
        else:
            hint = did_you_mean(name, KINDS)
            mistakes.append(
                f"rows: found {part!r}, expected a row's number from 0, a range such as 0:5, or "
                f"one of {', '.join(KINDS)}" + (f"; {hint}" if hint else "")
            )
    if not (numbers or kinds or mistakes):
        mistakes.append(f"rows: found {text!r}, expected at least one row, such as 0:3")
    if mistakes:
        raise ConfigError(mistakes=mistakes)
    return RowChoice(frozenset(numbers), kinds)
