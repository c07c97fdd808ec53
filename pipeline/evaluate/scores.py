"""Scores of the harness's tasks, with what each document gave; its own form of results read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config import fingerprint

__all__ = ["Measured", "TaskScore", "measured_scores"]


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task."""

    task: str
    version: str
    metric: str
    filter: str
    """How the answers were read out of the text; `none` for log-likelihoods."""
    value: float
    standard_error: float | None
    """None where the harness gives none."""
    num_fewshot: int
    examples: int

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Measured:
    """A score, with what each document gave where the score is their mean."""

    score: TaskScore
    values: tuple[float, ...] = ()
    """One for each document; empty where the score is no mean of such values."""
    documents: str = ""
    """Digest of the documents, in order."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "score": self.score.to_json(),
            "values": list(self.values),
            "documents": self.documents,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measured:
        """Read the JSON form."""
        return cls(TaskScore(**data["score"]), tuple(data["values"]), str(data["documents"]))


def measured_scores(found: Mapping[str, Any] | None) -> list[Measured]:
    """Flatten the harness's `results`, whose keys are `metric,filter`.

    Args:
        found: what `simple_evaluate` returned, with its samples.
    """
    assert found is not None, "the harness returns None on other ranks alone"
    measured = []
    for task, values in found["results"].items():
        counts = found.get("n-samples", {}).get(task, {})
        samples = found.get("samples", {}).get(task, [])
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, int | float) and math.isfinite(error)
            score = TaskScore(
                task=str(task),
                version=str(found["versions"].get(task, "")),
                metric=metric,
                filter=filtered,
                value=float(value),
                standard_error=float(error) if known else None,
                num_fewshot=int(found.get("n-shot", {}).get(task, 0)),
                examples=int(counts.get("effective", 0)),
            )
            measured.append(_with_values(score, samples))
    return measured


def _with_values(score: TaskScore, samples: Sequence[Mapping[str, Any]]) -> Measured:
    """Add what each document gave, where their mean is the score."""
    own = sorted(
        (one for one in samples if one.get("filter") == score.filter and score.metric in one),
        key=lambda one: int(one["doc_id"]),
    )
    values = [one[score.metric] for one in own]
    if not values or not all(isinstance(value, int | float) for value in values):
        return Measured(score)
    if not math.isclose(sum(values) / len(values), score.value, rel_tol=1e-6, abs_tol=1e-9):
        return Measured(score)  # a perplexity, a correlation
    documents = fingerprint([str(one["doc_hash"]) for one in own])
    return Measured(score, tuple(map(float, values)), documents)
