"""Models side by side on the same tasks: differences with paired errors, tables, kept results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config import fingerprint
from pipeline.errors import StoreError
from pipeline.evaluate.harness import HarnessRun
from pipeline.evaluate.scores import Measured, TaskScore
from pipeline.evaluate.task_files import Task
from pipeline.storage import Store

__all__ = [
    "Difference",
    "KeptResults",
    "ModelScores",
    "differences",
    "markdown_tables",
    "terminal_tables",
]

_KEPT = "lm-eval"


@dataclass(frozen=True, slots=True)
class ModelScores:
    """One model's scores."""

    name: str
    """Its part in the comparison: student, before, control, teacher, or a name that was given."""
    source: str
    """Folder or hub id."""
    measured: tuple[Measured, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """By how much one model's score is above another's."""

    model: str
    other: str
    task: str
    metric: str
    filter: str
    value: float
    standard_error: float | None
    """Paired by document; None where the scores are no means over the same documents."""
    documents: int

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def differences(models: Sequence[ModelScores]) -> list[Difference]:
    """Return the first model's scores minus each other model's, metric by metric."""
    first, *others = models
    found = []
    for other in others:
        theirs = {_key(one.score): one for one in other.measured}
        for one in first.measured:
            if (same := theirs.get(_key(one.score))) is None:
                continue
            paired = bool(one.values) and one.documents == same.documents
            gaps = [a - b for a, b in zip(one.values, same.values, strict=True)] if paired else []
            task, metric, filtered = _key(one.score)
            found.append(
                Difference(
                    first.name, other.name, task, metric, filtered,
                    one.score.value - same.score.value, _standard_error(gaps), len(gaps),
                )
            )  # fmt: skip
    return found


def terminal_tables(models: Sequence[ModelScores], gaps: Sequence[Difference]) -> str:
    """Return the scores and the differences as columns of text."""
    heads, rows = _scores_table(models)
    text = _aligned([["task", "metric", *heads], *([*key, *cells] for key, cells in rows)])
    if not gaps:
        return text
    heads, rows = _gaps_table(models, gaps)
    below = _aligned([["task", "metric", *heads], *([*key, *cells] for key, cells in rows)])
    return f"{text}\n\n{below}\n\n{_MEANING}"


def markdown_tables(models: Sequence[ModelScores], gaps: Sequence[Difference]) -> str:
    """Return the same for a model card."""
    heads, rows = _scores_table(models)
    facts = {_shown(one.score): one.score for one in models[0].measured}
    lines = [_row(["task", "version", "examples", "shots", "metric", *heads])]
    lines.append("|---" * (5 + len(heads)) + "|")
    for key, cells in rows:
        score, (task, metric) = facts[key], key
        told = [score.version, str(score.examples), str(score.num_fewshot)]
        lines.append(_row([task, *told, metric, *cells]))
    if not gaps:
        return "\n".join(lines)
    heads, rows = _gaps_table(models, gaps)
    lines += ["", _row(["task", "metric", *heads]), "|---" * (2 + len(heads)) + "|"]
    lines += [_row([*key, *cells]) for key, cells in rows]
    return "\n".join([*lines, "", _MEANING])


class KeptResults:
    """What was measured before, by model, task and settings; below the run's folder.

    Args:
        store: of the run's folder.
    """

    def __init__(self, store: Store) -> None:
        """Read nothing yet."""
        self._store = store

    @staticmethod
    def key(
        revision: str, task: Task, run: HarnessRun, *, dtype: str, versions: Mapping[str, str]
    ) -> str:
        """Return the name of a result: a digest of all that decides it.

        Args:
            revision: of the model: a commit, or a digest of its folder.
            task: with its files.
            run: how; where it runs and how much at a time decide nothing.
            dtype: of the weights.
            versions: of the harness and what it uses.
        """
        how = asdict(run)
        for name in ("device", "batch_size", "parallelize"):
            del how[name]
        told = [revision, task.name, task.digest, how, dtype, dict(versions)]
        return fingerprint(told)[:32]

    def get(self, key: str) -> list[Measured] | None:
        """Return a result, or None where there is none that can be read."""
        try:
            data = json.loads(self._store.read(f"{_KEPT}/{key}.json"))
            return [Measured.from_json(one) for one in data["measured"]]
        except (FileNotFoundError, StoreError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, model: str, task: Task, measured: Sequence[Measured]) -> None:
        """Keep a result."""
        data = {
            "model": model,
            "task": task.name,
            "measured": [one.to_json() for one in measured],
        }
        self._store.write(f"{_KEPT}/{key}.json", (json.dumps(data, indent=1) + "\n").encode())


_MEANING = (
    "Standard errors of differences are paired by document; two of them are what chance gives in "
    "one of twenty."
)


def _key(score: TaskScore) -> tuple[str, str, str]:
    return score.task, score.metric, score.filter


def _shown(score: TaskScore) -> tuple[str, str]:
    filtered = "" if score.filter in ("", "none") else f", {score.filter}"
    return score.task, f"{score.metric}{filtered}"


def _standard_error(gaps: Sequence[float]) -> float | None:
    if len(gaps) < 2:
        return None
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
    return math.sqrt(variance / len(gaps))


_Rows = list[tuple[tuple[str, str], list[str]]]


def _scores_table(models: Sequence[ModelScores]) -> tuple[list[str], _Rows]:
    columns = [{_key(one.score): one.score for one in model.measured} for model in models]
    rows: _Rows = []
    for one in models[0].measured:
        scores = [column.get(_key(one.score)) for column in columns]
        cells = ["-" if it is None else _number(it.value, it.standard_error) for it in scores]
        rows.append((_shown(one.score), cells))
    return [model.name for model in models], rows


def _gaps_table(
    models: Sequence[ModelScores], gaps: Sequence[Difference]
) -> tuple[list[str], _Rows]:
    others = [model.name for model in models[1:]]
    by_key = {(gap.other, gap.task, gap.metric, gap.filter): gap for gap in gaps}
    rows: _Rows = []
    for one in models[0].measured:
        found = [by_key.get((other, *_key(one.score))) for other in others]
        cells = [
            "-" if gap is None else _number(gap.value, gap.standard_error, sign="+")
            for gap in found
        ]
        rows.append((_shown(one.score), cells))
    return [f"{models[0].name} - {other}" for other in others], rows


def _number(value: float, error: float | None, *, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
