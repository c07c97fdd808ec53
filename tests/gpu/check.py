"""What a check is, what it found, and how both are written and read."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "Check",
    "Figure",
    "Machine",
    "NeedsHardwareError",
    "Outcome",
    "Place",
    "at_least",
    "at_most",
    "run_check",
]

State = Literal["passed", "failed", "not run"]


class NeedsHardwareError(Exception):
    """What the check needs and this machine does not have, in words."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its limits; without limits it is only told."""

    name: str
    value: float
    highest: float | None = None
    lowest: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it lies within its limits; NaN never does."""
        return (self.highest is None or self.value <= self.highest) and (
            self.lowest is None or self.value >= self.lowest
        )

    def __str__(self) -> str:
        limits = [
            f"{word} {limit:g}"
            for word, limit in (("at most", self.highest), ("at least", self.lowest))
            if limit is not None
        ]
        shown = f"{self.name} {self.value:.4g}"
        return f"{shown} ({', '.join(limits)})" if limits else shown


def at_most(name: str, value: float, limit: float) -> Figure:
    """Return a figure that must not exceed `limit`."""
    return Figure(name, float(value), highest=limit)


def at_least(name: str, value: float, limit: float) -> Figure:
    """Return a figure that must reach `limit`."""
    return Figure(name, float(value), lowest=limit)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a check runs."""

    device: str
    """`cuda` or `cpu`."""
    scratch: Path
    """A folder that all checks of one call share."""

    @property
    def on_gpu(self) -> bool:
        """Whether there is one."""
        return self.device == "cuda"


@dataclass(frozen=True, slots=True)
class Check:
    """One question to the machine; it is asked in a process of its own."""

    name: str
    question: str
    function: str
    """`module:name` of a function that takes the place and returns figures."""
    stage: Literal["teacher", "student"] = "student"
    """Whose environment it needs."""
    gpus: int = 0
    """GPUs without which it shows nothing."""
    processes: int = 1
    """Of the run: where there is a GPU, each needs its own."""
    limit_s: float = 180.0
    """Its process is ended after this time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check found."""

    name: str
    question: str
    state: State
    seconds: float
    figures: tuple[Figure, ...] = ()
    message: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        """Read what `to_json` wrote."""
        figures = tuple(Figure(**figure) for figure in data["figures"])
        return cls(**{**data, "figures": figures})


@dataclass(frozen=True, slots=True)
class Machine:
    """What the checks ran on."""

    device: str
    gpus: int
    made: str
    """Day, as ISO 8601 writes it."""
    versions: dict[str, str] = field(default_factory=dict)


def run_check(check: Check, place: Place) -> tuple[State, Sequence[Figure], str]:
    """Ask one check in this process; return state, figures and, where it failed, why."""
    module, name = check.function.split(":")
    try:
        function: Callable[[Place], Sequence[Figure]] = getattr(
            importlib.import_module(module), name
        )
        figures = function(place)
    except NeedsHardwareError as error:
        return "not run", (), str(error)
    except Exception as error:
        # Whatever it is, it belongs into the table; the others are still asked.
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return "failed", (), f"{type(error).__name__}: {reason}"
    broken = [str(figure) for figure in figures if not figure.holds]
    return ("failed" if broken else "passed"), figures, "; ".join(broken)
