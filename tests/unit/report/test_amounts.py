"""Amounts are shown with the unit and the digits that tell them from nothing, by one function."""

from __future__ import annotations

import ast
import re

import pytest

from pipeline.amounts import (
    bytes_per_token,
    error_decimals,
    format_bytes,
    format_duration,
    format_kept_mass,
    value_decimals,
)
from tests.stage_runner import ROOT


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.46 KiB"),
        (1_048_000, "1023 KiB"),
        (1_048_575, "1 MiB"),
        (2_500_000, "2.38 MiB"),
        (3 << 29, "1.5 GiB"),
        (1000 << 30, "1000 GiB"),
        (5 << 40, "5 TiB"),
    ],
)
def test_a_size_has_the_unit_that_fits(size: int, shown: str) -> None:
    assert format_bytes(size) == shown


def test_durations() -> None:
    assert format_duration(None) == "—"
    assert [format_duration(s) for s in (4, 90, 7200)] == ["4 s", "1.5 min", "2.0 h"]
    assert [format_duration(s) for s in (0, 0.031, 0.97)] == ["0 s", "0.03 s", "1 s"]


def test_bytes_a_token_of_nothing() -> None:
    assert bytes_per_token(300, 4) == 75
    assert bytes_per_token(300, 0) == 0


def test_a_mass_is_never_shown_as_none_where_there_is_some() -> None:
    assert format_kept_mass(0.98765) == "0.9877"
    assert format_kept_mass(0.0000321) == "0.000032"
    # A top-k's is 1 less the stored tail, which has no code between 1 and 0.94.
    assert format_kept_mass(0.0) == "under 0.03"


def test_digits_of_errors_and_values() -> None:
    assert [error_decimals(e) for e in (12.0, 0.5, 0.02, 2e-5, 1e-12)] == [0, 2, 3, 6, 7]
    assert [value_decimals(v) for v in (0.0, 3.0, -0.00018, float("inf"))] == [0, 1, 5, 0]


def test_no_other_place_makes_text_of_a_size() -> None:
    """Each of them had one unit for all sizes, and printed 0.00 GiB."""
    own = re.compile(r"\s*[KMGT]i?B\b")
    for file in [f for part in ("pipeline", "stages", "k8s") for f in (ROOT / part).rglob("*.py")]:
        if file.name == "amounts.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.JoinedStr):
                continue
            parts = zip(node.values, node.values[1:], strict=False)
            found = [
                after.value
                for before, after in parts
                if isinstance(before, ast.FormattedValue)
                and isinstance(after, ast.Constant)
                and own.match(str(after.value))
            ]
            assert not found, f"{file.relative_to(ROOT)}:{node.lineno}: use format_bytes"
