"""Records of a sweep: what varied, what decided, and how every run of it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.report.data.fields import STRICT, Count, Number
from pipeline.report.data.measures import Difference, Measure

__all__ = ["RunState", "SweepFacts", "SweepPoint"]

RunState = Literal["finished", "pruned", "failed", "waiting", "running"]


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One run of a sweep and how it compares with the best."""

    __pydantic_config__ = STRICT

    label: str
    folder: str
    state: RunState
    values: dict[str, str]
    """The swept fields as text, by dotted name."""
    numbers: dict[str, Number] = field(default_factory=dict)
    """Those of them that are numbers."""
    rank: Count = 0
    """Place by the objective, from 1; 0 for a run without a result."""
    objective: Measure | None = None
    before: Measure | None = None
    """The objective of its student before training, where that was measured."""
    difference: Difference | None = None
    """To the best run, over the same held-out sequences; none of the best itself."""
    error: str = ""

    @property
    def verdict(self) -> Literal["best", "within noise", "worse", "not comparable", ""]:
        """What the difference to the best run says."""
        if not self.rank:
            return ""
        if self.difference is None:
            return "best" if self.rank == 1 else "not comparable"
        if self.difference.standard_errors is None:
            return "not comparable"
        return "worse" if self.difference.clear else "within noise"


@dataclass(frozen=True, slots=True)
class SweepFacts:
    """A sweep: what varied, what decided, and every run of it."""

    __pydantic_config__ = STRICT

    name: str
    objective: str
    """The metric's key, as in `heldout/kl`."""
    label: str
    """The metric in words."""
    unit: str
    maximize: bool
    fields: tuple[str, ...]
    """The swept fields, dotted."""
    points: tuple[SweepPoint, ...]
    """The best first, then those without a result."""

    @property
    def ranked(self) -> tuple[SweepPoint, ...]:
        """The runs with a result, the best first."""
        return tuple(point for point in self.points if point.rank)
