"""Records of how runs went: curves, speeds, settings, and what their models expect and write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.report.data.fields import STRICT, Count, Kind, Number

__all__ = [
    "Command",
    "Curve",
    "Generation",
    "Passage",
    "SettingDifference",
    "Speed",
    "TokenView",
]


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of one chart: curves of the same `name` share a chart, `series` tells them apart."""

    __pydantic_config__ = STRICT

    name: str
    """What is shown, as the chart's heading: "training loss", "held-out KL"."""
    points: tuple[tuple[Count, Number], ...]
    """(step or tokens, value), rising."""
    series: str = ""
    kind: Kind = "distilled"
    """Whose run it is; decides colour and line style."""
    unit: str = ""
    group: Literal["learning", "speed"] = "learning"
    rank: Count = 0
    """As of the row that it belongs to."""
    over: Literal["step", "tokens"] = "step"
    """What the first number of a point counts: steps, or the tokens trained on until then."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one run was, and what it needed."""

    __pydantic_config__ = STRICT

    name: str
    steps: Count
    tokens: Count
    """Of the logged steps."""
    tokens_per_s: Number
    """Median over the steps."""
    wait_share: Number
    """Of the time of the steps, the part in which the model waited for data."""
    peak_memory_gib: Number | None = None
    """Of a process, in the memory of the machine."""
    seconds: Number | None = None
    """Of the run from start to end, start-up and evaluations included; none if not measured."""
    rank: Count = 0
    tokens_per_s_per_device: Number | None = None
    """Median over the steps."""
    mfu: Number | None = None
    """Model FLOPs utilisation: of the device's peak, the part that the model's own operations take,
    from 0 to 1; median over the steps, of the first process; none where the peak is not known."""
    device_peak_gib: Number | None = None
    """Of the GPU of the first process; none on a CPU."""
    skipped_updates: Count | None = None
    """Steps whose gradients were not finite, so that the weights stayed."""


@dataclass(frozen=True, slots=True)
class SettingDifference:
    """A setting in which the runs of this report differ."""

    __pydantic_config__ = STRICT

    field: str
    values_by_run: dict[str, str]


@dataclass(frozen=True, slots=True)
class Command:
    """A command line that gives a part of this report, and which part that is."""

    __pydantic_config__ = STRICT

    what: str
    command: str


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token of a passage, and what teacher and student expected in its place."""

    __pydantic_config__ = STRICT

    text: str
    kl: Number | None = None
    """Bucketed KL from teacher to student at this position, in nats; none where nothing was
    predicted."""
    teacher_top: tuple[tuple[str, Number], ...] = ()
    student_top: tuple[tuple[str, Number], ...] = ()


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of held-out text, token by token."""

    __pydantic_config__ = STRICT

    title: str
    tokens: tuple[TokenView, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """What each model wrote for one prompt."""

    __pydantic_config__ = STRICT

    prompt: str
    texts: dict[str, str]
