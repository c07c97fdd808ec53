"""The data of a report: frozen records, without any opinion on how they look."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.report.data.jsonable import from_jsonable, to_jsonable

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
    "SettingDifference",
    "ShardFacts",
    "Speed",
    "SweepFacts",
    "SweepPoint",
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
    rank: int = 0
    """Place among the runs of a sweep, from 1; decides colour and line style. 0 outside of one."""


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
    """What is sampled, as the chart's heading: "training loss", "held-out KL"."""
    points: tuple[tuple[int, float], ...]
    """(step, value), by rising step."""
    series: str = ""
    kind: Kind = "distilled"
    """Whose run it is; decides colour and line style."""
    unit: str = ""
    group: Literal["learning", "speed"] = "learning"
    rank: int = 0
    """As of the row that it belongs to."""


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """One shard of the cache."""

    name: str
    split: str
    samples: int
    loss_tokens: int
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
    loss_tokens: int
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
    def bytes_per_loss_token(self) -> float:
        """The price of one teacher target; 0 for an empty cache."""
        return self.size_bytes / self.loss_tokens if self.loss_tokens else 0.0


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
class Speed:
    """How fast one run was, and what it needed."""

    name: str
    steps: int
    tokens: int
    """Of the logged steps."""
    tokens_per_s: float
    """Median over the steps."""
    wait_share: float
    """Of the time of the steps, the part in which the model waited for data."""
    peak_memory_gib: float | None = None
    seconds: float | None = None
    """Of the whole run, start-up and evaluations included; none where it was not measured."""
    rank: int = 0


@dataclass(frozen=True, slots=True)
class SettingDifference:
    """A setting in which the runs of this report differ."""

    field: str
    values_by_run: dict[str, str]


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One run of a sweep and how it compares with the best."""

    label: str
    folder: str
    state: Literal["finished", "pruned", "failed", "waiting", "running"]
    values: dict[str, str]
    """The swept fields as text, by dotted name."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Those of them that are numbers."""
    rank: int = 0
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
    sweep: SweepFacts | None = None
    speeds: tuple[Speed, ...] = ()
    setting_differences: tuple[SettingDifference, ...] = ()
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
