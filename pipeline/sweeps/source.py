"""Where the next run comes from: a list that is known from the start, or a search that asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from pipeline.sweeps.plan import PlannedRun

__all__ = ["ListSource", "Outcome", "RunSource"]

Outcome = Literal["finished", "pruned", "failed"]


class RunSource(Protocol):
    """Gives runs one by one; receives their outcomes."""

    @property
    def total(self) -> int:
        """Runs in all, those done included."""

    def next(self) -> PlannedRun | None:
        """Return the next run to be done, none when there is no more."""

    def report(self, run: PlannedRun, step: int, value: float) -> bool:
        """Take the objective in the middle of a run; true where the run should be given up."""

    def done(self, run: PlannedRun, outcome: Outcome, value: float | None) -> None:
        """Take the end of a run; `value` is the objective, none where it has none."""


class ListSource:
    """The runs of a grid or list, in order."""

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        """Keep the runs."""
        self._left = list(runs)
        self.total = len(runs)

    def next(self) -> PlannedRun | None:
        """Return the next run of the list."""
        return self._left.pop(0) if self._left else None

    def report(self, run: PlannedRun, step: int, value: float) -> bool:
        """Every run of a list goes to its end."""
        return False

    def done(self, run: PlannedRun, outcome: Outcome, value: float | None) -> None:
        """Nothing follows from it."""
