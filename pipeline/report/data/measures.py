"""Records of what was measured: numbers with errors, models by their numbers, differences."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.report.data.fields import STRICT, Count, Kind, Number

__all__ = ["CLEAR_STANDARD_ERRORS", "Difference", "Measure", "Row"]

CLEAR_STANDARD_ERRORS = 3.0
"""A difference beyond this many standard errors is called clear; below it, noise."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A number and how well it is known."""

    __pydantic_config__ = STRICT

    value: Number
    standard_error: Number | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One model, measured on the held-out part."""

    __pydantic_config__ = STRICT

    name: str
    kind: Kind
    metrics: dict[str, Measure]
    """By the names in `pipeline.report.text.metrics`; what was not measured is absent."""
    num_parameters: Count | None = None
    detail: str = ""
    rank: Count = 0
    """Place among the runs of a sweep, from 1; decides colour and line style. 0 outside of one."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Metric of row `a` minus metric of row `b`."""

    __pydantic_config__ = STRICT

    a: str
    b: str
    metric: str
    value: Number
    standard_error: Number | None = None
    paired: bool = True
    """Whether both were measured on the same tokens and subtracted one by one, which takes the
    difficulty of the text out of the error."""

    @property
    def standard_errors(self) -> float | None:
        """How many standard errors the difference is away from zero; none if not known."""
        if self.standard_error is None or not math.isfinite(self.standard_error):
            return None
        if self.standard_error == 0.0:
            return 0.0 if self.value == 0.0 else math.inf
        return abs(self.value) / self.standard_error

    @property
    def clear(self) -> bool:
        """Whether the difference is beyond noise (more than three standard errors)."""
        distance = self.standard_errors
        return distance is not None and distance > CLEAR_STANDARD_ERRORS
