"""A run folder and what the run left in it, read once, under the names the report uses."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ResumeError
from pipeline.evaluate.measures import HeldoutScores
from pipeline.observe.metrics import METRICS_FILE, MetricRecord, read_metrics
from pipeline.report.data.fields import Kind

__all__ = ["Run", "RunFolder", "has_ended", "logged_key", "read_run"]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A finished run of stage two and its role in the report."""

    name: str
    kind: Kind
    path: Path
    detail: str = ""
    rank: int = 0
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What a finished run left."""

    folder: RunFolder
    after: HeldoutScores | None
    """Of the trained student; none where the run evaluated never."""
    before: HeldoutScores | None
    """Of the student before training; none where it was not measured."""
    metrics: tuple[MetricRecord, ...]
    config_text: str
    """The resolved configuration as YAML; empty where there is none."""
    num_parameters: int

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        data = yaml.safe_load(self.config_text)
        return data if isinstance(data, dict) else {}

    @property
    def model(self) -> Path:
        """The folder of the trained student."""
        return self.folder.path / "model"


def read_run(folder: RunFolder, *, bucketed: bool) -> Run:
    """Read what a run left.

    Args:
        folder: of the run.
        bucketed: whether its KL is over a top-k and its tail bucket.

    Raises:
        ResumeError: the run is not finished.
    """
    after = _scores(folder.path, "after", bucketed=bucketed)
    if after is None and not has_ended(folder.path):
        raise ResumeError(
            f"{folder.path}: no heldout-after.json",
            expected="a finished run of train-student",
            do="run the same train-student command again; it goes on where it stopped",
        )
    config = folder.path / "config.yaml"
    return Run(
        folder=folder,
        after=after,
        before=_scores(folder.path, "before", bucketed=bucketed),
        metrics=_metrics(folder.path, bucketed=bucketed),
        config_text=config.read_text(encoding="utf-8") if config.exists() else "",
        num_parameters=_count_parameters(folder.path / "model"),
    )


def has_ended(folder: Path) -> bool:
    """Whether a run has got as far as its scores, or to its end without any."""
    return any((folder / name).exists() for name in ("heldout-after.json", "finished.json"))


def logged_key(key: str, *, bucketed: bool) -> str:
    """Return the key under which the report shows a logged value: the KL by what it is over."""
    if bucketed and key == "heldout/acceptance":
        return "heldout/acceptance_bound"
    return f"{key}_bucketed" if bucketed and key in ("train/kl", "heldout/kl") else key


def _scores(folder: Path, when: str, *, bucketed: bool) -> HeldoutScores | None:
    file = folder / f"heldout-{when}.json"
    if not file.exists():
        return None
    scores = HeldoutScores.read(str(file))
    prefix = "heldout/"
    sums = {
        logged_key(prefix + name, bucketed=bucketed).removeprefix(prefix): values
        for name, values in scores.sums.items()
    }
    return replace(scores, sums=sums)


def _metrics(folder: Path, *, bucketed: bool) -> tuple[MetricRecord, ...]:
    file = folder / METRICS_FILE
    if not file.exists():
        return ()
    return tuple(
        MetricRecord(
            record.step,
            {logged_key(key, bucketed=bucketed): value for key, value in record.values.items()},
        )
        for record in read_metrics(file)
    )


def _count_parameters(folder: Path) -> int:
    """Count the numbers in the safetensors headers, without reading the weights."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        total += sum(
            math.prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__"
        )
    return total
