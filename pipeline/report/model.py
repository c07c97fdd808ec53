"""The data of a report: frozen records, without any opinion on how they look."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.report.jsonable import from_jsonable, to_jsonable

__all__ = [
    "CacheFacts",
    "Command",
    "Curve",
    "Difference",
    "Generation",
    "Kind",
    "Measure",
    "Passage",
    "Report",
    "Row",
    "ShardFacts",
    "TokenView",
]

Kind = Literal["before", "control", "distilled", "teacher"]

CLEAR_STANDARD_ERRORS = 3.0
"""A difference beyond this many standard errors is called clear; below it, noise."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A number and how well it is known."""

    value: float
    standard_error: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One model, measured on the held-out part."""

    name: str
    kind: Kind
    metrics: dict[str, Measure]
    """By the names in `pipeline.report.metrics`: kl, cross_entropy, perplexity, top1_agreement
    (a fraction), ece. A metric that was not measured is absent."""
    num_parameters: int | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """Metric of row `a` minus metric of row `b`."""

    a: str
    b: str
    metric: str
    value: float
    standard_error: float | None = None
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


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of one chart: curves of the same `name` share a chart, `series` tells them apart."""

    name: str
    """What is drawn, as the chart's heading: "training loss", "held-out KL"."""
    points: tuple[tuple[int, float], ...]
    """(step, value), by rising step."""
    series: str = ""
    kind: Kind = "distilled"
    """Whose run it is; decides colour and line style."""
    unit: str = ""
    group: Literal["learning", "speed"] = "learning"


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """One shard of the cache."""

    name: str
    split: str
    samples: int
    counted_tokens: int
    size_bytes: int
    kept_mass_mean: float | None = None
    entropy_mean: float | None = None


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What the cache says about itself."""

    teacher: str
    teacher_revision: str
    corpus: str
    samples: int
    tokens: int
    counted_tokens: int
    size_bytes: int
    scheme: str
    """The capture scheme in words, as in "top-64 with the rest as one bucket"."""
    identity: str
    """The digest of the manifest's identity."""
    temperatures: tuple[float, ...] = (1.0,)
    kept_mass_mean: float | None = None
    entropy_mean: float | None = None
    shards: tuple[ShardFacts, ...] = ()

    @property
    def bytes_per_counted_token(self) -> float:
        """The price of one teacher target; 0 for an empty cache."""
        return self.size_bytes / self.counted_tokens if self.counted_tokens else 0.0


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token of a passage, and what teacher and student expected in its place."""

    text: str
    kl: float | None = None
    """KL from teacher to student at this position, in nats; none where nothing was predicted."""
    teacher_top: tuple[tuple[str, float], ...] = ()
    student_top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of held-out text, token by token."""

    title: str
    tokens: tuple[TokenView, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """What each model wrote for one prompt."""

    prompt: str
    texts: dict[str, str]


@dataclass(frozen=True, slots=True)
class Command:
    """A command line that made a part of this report, and what it made."""

    what: str
    command: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the page shows. What is empty has no section."""

    title: str
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...] = ()
    curves: tuple[Curve, ...] = ()
    cache: CacheFacts | None = None
    passages: tuple[Passage, ...] = ()
    generations: tuple[Generation, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    """The resolved YAML of each stage, by the stage's name."""
    environment: dict[str, Any] = field(default_factory=dict)
    commands: tuple[Command, ...] = ()
    notes: tuple[str, ...] = ()
    summary: str = ""
    """The one-sentence answer; computed from the numbers if empty, which is the honest way."""

    def to_json(self) -> dict[str, Any]:
        """Return plain mappings, lists, text and finite numbers."""
        return {"format": _FORMAT, **to_jsonable(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """Return the report that `to_json` gave.

        Raises:
            ConfigError: the data is not a report, or of a newer format; the place is named.
        """
        from pipeline.errors import ConfigError

        fields = dict(data)
        found = fields.pop("format", None)
        if found != _FORMAT:
            raise ConfigError(
                f"report.json of format {found!r}",
                expected=f"format {_FORMAT}",
                do="make the report again with this version of the pipeline",
            )
        return from_jsonable(cls, fields)


_FORMAT = 1
