"""Amounts as people read them: sizes, durations, shares, values with an error, bytes a token."""

from __future__ import annotations

import math

__all__ = [
    "BYTES_PER_TOKEN",
    "SMALLEST_KEPT_MASS",
    "bytes_per_token",
    "error_decimals",
    "format_bytes",
    "format_duration",
    "format_kept_mass",
    "value_decimals",
]

BYTES_PER_TOKEN = "bytes of data files per supervised token"
"""What every command, card and page calls `bytes_per_token`: the files below `data/`, which hold
the text (ids, masks, names) and the targets, divided by the supervised tokens in them."""

SMALLEST_KEPT_MASS = 0.03
"""A top-k's kept mass is 1 less its stored tail, whose largest code but one is exp(-1/16): half a
step below 1 nothing is told apart."""

_MOST_DECIMALS = 7


def bytes_per_token(data_bytes: float, loss_tokens: int) -> float:
    """Return the bytes of the data files for each supervised token; 0 without any token."""
    return data_bytes / loss_tokens if loss_tokens else 0.0


def format_bytes(value: float) -> str:
    """Return bytes with three digits and the binary unit that fits."""
    for factor, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        # What is rounded up to the next unit is said in it: "1 MiB", not "1.02e+03 KiB".
        if abs(value) >= 0.9995 * factor:
            amount = value / factor
            return f"{amount:.3g} {unit}" if abs(amount) < 999.5 else f"{amount:.0f} {unit}"
    return f"{value:.0f} bytes"


def format_duration(seconds: float | None) -> str:
    """Return seconds with the unit that a person would choose; a dash for none."""
    if seconds is None or not math.isfinite(seconds):
        return "—"
    for factor, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= factor:
            return f"{seconds / factor:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 0.95 or not seconds else f"{seconds:.1g} s"


def format_kept_mass(mass: float) -> str:
    """Return a mass between 0 and 1 with four decimals, or as many as it takes to tell it from 0.

    A recorded 0 says only that the entries have less than can be told from nothing.
    """
    if mass <= 0:
        return f"under {SMALLEST_KEPT_MASS:g}"
    return f"{mass:.{max(4, value_decimals(mass))}f}"


def error_decimals(error: float) -> int:
    """Return the decimals that show two digits of a standard error."""
    return min(max(1 - math.floor(math.log10(error)), 0), _MOST_DECIMALS)


def value_decimals(value: float) -> int:
    """Return the decimals that show two digits of a value; 0 for zero."""
    return error_decimals(abs(value)) if value and math.isfinite(value) else 0
