"""What the stages leave, as objects: a trained student, a finished sweep, their reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.api.process import run_stage

if TYPE_CHECKING:
    from pipeline.evaluate.measures import HeldoutScores
    from pipeline.report import Report
    from pipeline.sweeps.ledger import Entry

__all__ = ["SweepResult", "TrainedStudent"]


@dataclass(frozen=True, slots=True)
class TrainedStudent:
    """A finished run of stage two."""

    folder: Path
    """The run's output folder."""

    @property
    def model(self) -> Path:
        """The student, for `AutoModelForCausalLM.from_pretrained`."""
        return self.folder / "model"

    @property
    def before(self) -> HeldoutScores | None:
        """Held-out scores before training; none where they were not measured."""
        return _scores(self.folder / "heldout-before.json")

    @property
    def after(self) -> HeldoutScores | None:
        """Held-out scores after training; none where they were not measured."""
        return _scores(self.folder / "heldout-after.json")

    def metrics(self) -> list[dict[str, float]]:
        """Return what was logged: a mapping a line, `step` and the metrics' names."""
        from pipeline.observe.metrics import read_metrics

        return [
            {"step": record.step, **record.values}
            for record in read_metrics(self.folder / "metrics.jsonl")
        ]

    def report(self) -> Report:
        """Write the report beside the run (`report/report.html`) and return its record.

        Raises:
            DistillError: the run or its cache is not there any more.
        """
        return _report(self.folder)


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A finished sweep."""

    folder: Path

    @property
    def runs(self) -> list[Entry]:
        """The finished runs, the best first: name, label, settings, objective."""
        from pipeline.sweeps.ledger import read_inventory

        return read_inventory(self.folder).ranked()

    @property
    def best(self) -> TrainedStudent:
        """The student of the best run."""
        return self.student(self.runs[0].name)

    def student(self, name: str) -> TrainedStudent:
        """Return the student of a run by its name."""
        return TrainedStudent(self.folder / "runs" / name)

    def report(self) -> Report:
        """Write the sweep's report (`report/report.html`) and return its record."""
        return _report(self.folder)


def _scores(path: Path) -> HeldoutScores | None:
    from pipeline.evaluate.measures import HeldoutScores

    return HeldoutScores.read(str(path)) if path.exists() else None


def _report(folder: Path) -> Report:
    from pipeline.report import read_report

    run_stage("stages.report", ["--run_dir", str(folder)])
    return read_report(folder / "report" / "report.json")
