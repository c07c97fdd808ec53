"""Measures over held-out sequences: ratio means, standard errors, paired differences."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np

__all__ = [
    "METRICS",
    "UNLIKE_METRICS",
    "HeldoutScores",
    "MeanError",
    "paired_difference",
    "ratio_mean",
]

_Value = TypeVar("_Value")

METRICS = ("kl", "cross_entropy", "top1_agreement", "acceptance")
UNLIKE_METRICS = ("uld", "cross_entropy")
"""Across tokenizers: neither KL nor top-1 agreement is defined."""


@dataclass(frozen=True, slots=True)
class MeanError:
    """A mean over tokens and its standard error over sequences."""

    value: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class HeldoutScores:
    """Sums of each held-out sequence; sequences, not tokens, are the independent observations."""

    sample_ids: tuple[str, ...]
    loss_tokens: tuple[int, ...]
    """Supervised tokens of each sequence."""
    sums: dict[str, tuple[float, ...]]
    """For each metric the sum over the supervised tokens of each sequence."""
    confidence_bins: tuple[tuple[float, float, int], ...] = field(default=())
    """Per bin: sum of the student's confidence, number correct, number of tokens."""
    confidence_gaps: tuple[tuple[float, ...], ...] = field(default=())
    """For each sequence and bin: the sum of the confidence minus the number correct."""
    with_target: tuple[int, ...] = field(default=())
    """Supervised tokens of each sequence that have entries, where `uld` is measured, which is
    averaged over them."""
    bounds: tuple[str, ...] = field(default=())
    """Metrics of `sums` that are lower bounds, over a top-k and its tail bucket; the others are
    exact or unbiased. A difference of bounds is no bound of the difference."""

    def mean(self, metric: str) -> MeanError:
        """Return the token mean of a metric of `sums`, such as `kl` or `cross_entropy` in nats."""
        return ratio_mean(
            self.sums[metric], self.with_target if metric == "uld" else self.loss_tokens
        )

    @property
    def distance(self) -> str:
        """Name of the measured distance to the teacher: `kl`, or `uld` across tokenizers."""
        return "uld" if "uld" in self.sums else "kl"

    def by_tag(self) -> dict[str, HeldoutScores]:
        """Return the scores of each cache of a mixture, whose sample ids are `TAG:ID`.

        Without calibration, which is kept for all together. Empty of a single cache.
        """
        tags = [name.rpartition(":")[0] for name in self.sample_ids]
        return {
            tag: HeldoutScores(
                sample_ids=_picked(self.sample_ids, tags, tag),
                loss_tokens=_picked(self.loss_tokens, tags, tag),
                sums={name: _picked(values, tags, tag) for name, values in self.sums.items()},
                with_target=_picked(self.with_target, tags, tag),
                bounds=self.bounds,
            )
            for tag in sorted({*tags} - {""})
        }

    def perplexity(self) -> MeanError:
        """Return exp of the cross-entropy; its error by the delta method."""
        entropy = self.mean("cross_entropy")
        value = math.exp(entropy.value)
        return MeanError(value, value * entropy.standard_error)

    def calibration_error(self) -> MeanError | None:
        """Return the expected calibration error of the top token, None where not recorded.

        The sum over bins of |confidence - accuracy| times the bin's share (Naeini et al. 2015). Its
        standard error is by the delta method: that of the ratio mean with each bin's sign fixed.
        The estimate is biased upwards where the true gaps are smaller than their noise.
        """
        total = sum(count for _, _, count in self.confidence_bins)
        if not total:
            return None
        value = sum(abs(conf - right) for conf, right, _ in self.confidence_bins) / total
        if not self.confidence_gaps:
            return MeanError(value, math.nan)
        return MeanError(value, ratio_mean(self.sums_of("ece"), self.loss_tokens).standard_error)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `sums_of` accepts."""
        return (*self.sums, *(("ece",) if self.confidence_gaps else ()))

    def sums_of(self, metric: str) -> Sequence[float]:
        """Return each sequence's term of a metric's numerator; also for `ece`."""
        if metric != "ece":
            return self.sums[metric]
        signs_B = [math.copysign(1.0, conf - right) for conf, right, _ in self.confidence_bins]
        summed: list[float] = (np.asarray(self.confidence_gaps) @ np.asarray(signs_B)).tolist()
        return summed

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        data = asdict(self)
        for name in ("with_target", "confidence_gaps", "bounds"):
            if not data[name]:
                del data[name]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HeldoutScores:
        """Read the JSON form."""
        return cls(
            sample_ids=tuple(data["sample_ids"]),
            loss_tokens=tuple(data["loss_tokens"]),
            sums={name: tuple(values) for name, values in data["sums"].items()},
            confidence_bins=tuple(
                (float(a), float(b), int(n)) for a, b, n in data["confidence_bins"]
            ),
            confidence_gaps=tuple(tuple(gaps) for gaps in data.get("confidence_gaps", ())),
            with_target=tuple(data.get("with_target", ())),
            bounds=tuple(data.get("bounds", ())),
        )

    @classmethod
    def read(cls, path: str) -> HeldoutScores:
        """Read a file written from `to_json`."""
        with open(path, encoding="utf-8") as file:
            return cls.from_json(json.load(file))


def _picked(values: Sequence[_Value], tags: Sequence[str], tag: str) -> tuple[_Value, ...]:
    """Return the values of the sequences of a tag; of no sequences there are none."""
    return tuple(v for v, t in zip(values, tags, strict=True) if t == tag) if values else ()


def ratio_mean(sums: Sequence[float], counts: Sequence[int]) -> MeanError:
    """Return sum(sums) / sum(counts) and its standard error over sequences.

    The ratio estimator's variance (Cochran, Sampling Techniques, eq. 6.13):
    n / (n - 1) * sum (s_i - R c_i)^2 / (sum c)^2. NaN with fewer than two sequences.
    """
    s, c = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    total = c.sum()
    if not total:
        return MeanError(math.nan, math.nan)
    ratio = s.sum() / total
    if s.size < 2:
        return MeanError(float(ratio), math.nan)
    variance = s.size / (s.size - 1) * np.square(s - ratio * c).sum() / total**2
    return MeanError(float(ratio), float(np.sqrt(variance)))


def paired_difference(a: HeldoutScores, b: HeldoutScores, metric: str) -> MeanError:
    """Return mean(a) - mean(b) on the same sequences; pairing removes their common variance."""
    assert a.sample_ids == b.sample_ids, "paired scores need the same sequences"
    difference = np.asarray(a.sums_of(metric)) - np.asarray(b.sums_of(metric))
    return ratio_mean(difference.tolist(), a.loss_tokens)
