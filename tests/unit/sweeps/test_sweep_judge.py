"""What a search hears of a run: neither the untrained student nor the result itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.api.settings import StudentRun
from pipeline.observe.metrics import MetricRecord
from pipeline.sweeps.ledger import Ledger
from pipeline.sweeps.plan import Cost, PlannedRun
from pipeline.sweeps.run import Sweep, _Active
from pipeline.sweeps.slots import Slot
from pipeline.sweeps.source import ListSource
from pipeline.sweeps.space import Point


class _Source(ListSource):
    def __init__(self) -> None:
        super().__init__([])
        self.heard: list[tuple[int, float]] = []

    def report(self, run: PlannedRun, step: int, value: float) -> bool:
        self.heard.append((step, value))
        return False


class _Process:
    def __init__(self, run: PlannedRun) -> None:
        self.run = run

    def new_records(self) -> list[MetricRecord]:
        return [MetricRecord(step, {"heldout/kl": 10.0 - step}) for step in (0, 2, 4, 6)]


def test_only_evaluations_in_the_middle_are_judged(tmp_path: Path) -> None:
    settings = StudentRun()
    run = PlannedRun("a", Point({}, settings), tmp_path, "", settings, Cost(6, 0, 0, 0, 0))
    ledger = Ledger("s", "f", "cache", "heldout/kl", False, (), "command")
    source = _Source()
    sweep = Sweep(tmp_path, ledger, source, [], command=[], say=print)
    process: Any = _Process(run)
    active = _Active(process, Slot(0, {}), looked=0.0)
    sweep._judge(active)
    assert source.heard == [(2, 8.0), (4, 6.0)]
    assert active.step == 6
