"""The types of the records' fields, as they are read from JSON and written to it."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, PlainSerializer, Strict

__all__ = ["STRICT", "Count", "Kind", "Number"]

STRICT = ConfigDict(extra="forbid")
"""Of each record: a member that it does not know is an error."""

Kind = Literal["before", "control", "dense", "distilled", "teacher"]
"""The role of a model in the report."""


def _from_json(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


Count = Annotated[int, Strict()]
"""An integer: neither `true` nor "3"."""
Number = Annotated[float, Strict(), BeforeValidator(_from_json), PlainSerializer(_to_json)]
"""A number. JSON has no NaN and no infinity; as text the file stays valid."""
