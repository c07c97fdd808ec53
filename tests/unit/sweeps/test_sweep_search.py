"""What a study keeps of each trial's end; no process is started."""

from __future__ import annotations

from pathlib import Path

from pipeline.sweeps.file import SweepFile
from tests.unit.sweeps.quick_sweep import quick_sweep


def test_the_study_keeps_how_each_trial_ended(tmp_path: Path) -> None:
    file = SweepFile.model_validate(
        {"search": {"trials": 4, "space": {"temperature": {"low": 1, "high": 4}}}}
    )
    source = quick_sweep(file, tmp_path)[1]
    for outcome, value in (("finished", 1.5), ("pruned", 0.1), ("failed", None)):
        run = source.next()
        assert run is not None
        source.done(run, outcome, value)
    again = quick_sweep(file, tmp_path)[1]  # another process reads the same
    ended = again.ended(tmp_path / "runs")
    assert [(entry.state, entry.objective) for entry in ended] == [
        ("finished", 1.5),
        ("pruned", None),
    ]
