"""The measures by name: what each is called, its unit, which way is better, what it says."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.amounts import error_decimals
from pipeline.report.data.measures import Row

__all__ = [
    "DISTANCES",
    "LOGGED",
    "METRICS",
    "Metric",
    "distance_of",
    "kl_note",
    "lower_first",
    "metric_decimals",
    "objective_words",
    "shown_metrics",
    "upper_first",
]


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is named and shown."""

    key: str
    label: str
    unit: str
    lower_is_better: bool
    percent: bool = False
    decimals: int = 3
    short: str = ""
    """As the head of a narrow column."""
    explanation: str = ""
    note: str = ""
    """What a reader has to know before taking the number for another."""

    @property
    def scale(self) -> float:
        """What a stored value is multiplied by to be shown."""
        return 100.0 if self.percent else 1.0

    @property
    def heading(self) -> str:
        """The label with its unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric(
            "own_kl", "KL on its own text", "nats", True, short="KL, own text",
            explanation="how far the model's next-token distribution is from the teacher's on what "
            "the model itself writes",
        ),
        Metric(
            "own_kl_bucketed", "Bucketed KL on its own text", "nats", True,
            short="bucketed KL, own text",
            explanation="how far the model's next-token distribution is from the teacher's on what "
            "the model itself writes, over the cached top-k and one entry for all other tokens",
        ),
        Metric(
            "kl", "KL to the teacher", "nats", True, short="KL",
            explanation="how far the model's next-token distribution is from the teacher's",
        ),
        Metric(
            "kl_bucketed", "Bucketed KL", "nats", True, short="bucketed KL",
            explanation="how far the model's next-token distribution is from the teacher's, over "
            "the cached top-k and one entry for all other tokens",
            note="Bucketed KL: over the cached top-k and one entry for all other tokens, a lower "
            "bound of the KL.",
        ),
        Metric(
            "uld", "ULD to the teacher", "", True, short="ULD",
            explanation="how far the sorted next-token probabilities are from the teacher's, where "
            "the two have other tokens",
        ),
        Metric(
            "cross_entropy", "Cross-entropy", "nats", True, short="CE",
            explanation="surprise at the text itself",
        ),
        Metric(
            "top1_agreement", "Top-1 agreement", "%", False, percent=True, decimals=1,
            short="top-1", explanation="how often the model's first choice is the teacher's",
        ),
        Metric(
            "acceptance", "Acceptance rate", "%", False, percent=True, decimals=1,
            short="acceptance",
            explanation="how often the teacher would accept the model's token in speculative "
            "decoding, sum of min(p, q); unbiased",
        ),
        Metric(
            "acceptance_bound", "Acceptance rate (bound)", "%", False, percent=True,
            decimals=1, short="acceptance",
            explanation="how often the teacher would accept the model's token in speculative "
            "decoding, sum of min(p, q) over the cached top-k alone",
            note="Acceptance: over the cached top-k alone, a lower bound.",
        ),
        Metric(
            "ece", "Calibration error", "%", True, percent=True, decimals=2, short="ECE",
            explanation="gap between the model's confidence and how often it is right",
        ),
        Metric(
            "written_drift", "Drift from the writer", "nats", True, short="drift",
            explanation="how much likelier the held-out text was to the model that wrote it",
        ),
        Metric(
            "perplexity", "Perplexity", "", True, decimals=2, short="perplexity",
            explanation="exponential of the cross-entropy",
        ),
    )
}  # fmt: skip
"""The metrics a row may hold, in the order they are shown."""

DISTANCES = ("kl", "kl_bucketed")
"""The metrics that say how far a model is from the teacher in nats; a report has one of them."""

LOGGED: dict[str, tuple[str, str]] = {
    "train/loss": ("training loss", "nats"),
    "train/kl": ("training KL", "nats"),
    "train/kl_bucketed": ("training bucketed KL", "nats"),
    "train/cross_entropy": ("training cross-entropy", "nats"),
    "heldout/kl": ("held-out KL", "nats"),
    "heldout/kl_bucketed": ("held-out bucketed KL", "nats"),
    "heldout/cross_entropy": ("held-out cross-entropy", "nats"),
    "heldout/acceptance": ("held-out acceptance rate", ""),
    "heldout/acceptance_bound": ("held-out acceptance rate (bound)", ""),
    "throughput/tokens_per_s": ("tokens per second", "tokens/s"),
    "throughput/mfu": ("model FLOPs utilisation", "of the device's peak"),
    "data/wait_s": ("waiting for data", "s"),
    "memory/peak_gib": ("peak memory", "GiB"),
    "memory/device_peak_gib": ("peak GPU memory", "GiB"),
}
"""(heading, unit) of the curves by the key in `metrics.jsonl`, in the order of the charts."""


def shown_metrics(rows: Iterable[Row]) -> list[Metric]:
    """Return the metrics that at least one row has, in the order of `METRICS`."""
    present = {key for row in rows for key in row.metrics}
    return [metric for metric in METRICS.values() if metric.key in present]


def distance_of(row: Row | None) -> Metric | None:
    """Return which KL the row has; None where none was measured."""
    return next((METRICS[key] for key in DISTANCES if row and key in row.metrics), None)


def kl_note(*, bucketed: bool) -> str:
    """Return what the KL of a report is over."""
    if bucketed:
        return METRICS["kl_bucketed"].note
    return (
        "KL: an unbiased estimate from a sample of the teacher's tail; its noise is in the error."
    )


def objective_words(objective: str) -> tuple[str, str]:
    """Return (label, unit) of a sweep's objective; a key that is not known is its own label."""
    metric = METRICS.get(objective.removeprefix("heldout/"))
    if objective.startswith("heldout/") and metric is not None:
        return f"held-out {lower_first(metric.label)}", metric.unit
    return LOGGED.get(objective, (objective, ""))


def metric_decimals(metric: Metric, rows: Iterable[Row]) -> int:
    """Return one number of decimals for a column: two digits of its smallest standard error."""
    errors = [
        measure.standard_error * metric.scale
        for row in rows
        if (measure := row.metrics.get(metric.key)) is not None and measure.standard_error
    ]
    errors = [error for error in errors if math.isfinite(error) and error > 0]
    return error_decimals(min(errors)) if errors else metric.decimals


def upper_first(text: str) -> str:
    """Return `text` as a sentence or a heading starts."""
    return text[:1].upper() + text[1:]


def lower_first(label: str) -> str:
    """Return a label as it is written inside a sentence."""
    # "KL to the teacher" keeps its capitals, "Cross-entropy" loses one.
    return label if label[:2].isupper() else label[:1].lower() + label[1:]
