"""A sweep of quick trainers over the folder and file given: a process that tests may kill."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from pipeline.api.settings import StudentRun
from pipeline.config import fingerprint
from pipeline.errors import run_command
from pipeline.sweeps.file import SweepFile, read_sweep_file
from pipeline.sweeps.ledger import Entry, Ledger
from pipeline.sweeps.plan import Cost, PlannedRun, slug
from pipeline.sweeps.run import Sweep
from pipeline.sweeps.search import SearchSource
from pipeline.sweeps.slots import make_slots
from pipeline.sweeps.source import ListSource
from pipeline.sweeps.space import Point, Space

TRAINER = [sys.executable, str(Path(__file__).with_name("quick_trainer.py"))]


def plan(folder: Path, point: Point) -> PlannedRun:
    digest = fingerprint(point.settings.model_dump(mode="json"))[:8]
    run_folder = folder / "runs" / f"{slug(point.values)}-{digest}"
    data = {**point.settings.model_dump(), "output": {"output_dir": str(run_folder)}}
    settings = StudentRun.model_validate(data)
    steps = settings.train.max_steps or 0
    return PlannedRun(run_folder.name, point, run_folder, digest, settings, Cost(steps, 0, 0, 0, 0))


def quick_sweep(
    file: SweepFile, folder: Path, *, parallel: int = 1, say: Any = None
) -> tuple[Sweep, Any]:
    base = StudentRun.model_validate({"train": {"max_steps": 10, "eval_steps": 1}})
    space = Space(base, file)
    assert not space.mistakes, space.mistakes
    if file.search:
        source: Any = SearchSource(
            folder,
            space=space,
            search=file.search,
            objective=file.objective,
            maximize=file.maximize,
            identity="cache",
            plan=lambda point: plan(folder, point),
        )
        runs = []
    else:
        runs = [plan(folder, point) for point in space.points()]
        source = ListSource(runs)
    entries = tuple(Entry(run.name, run.point.label, run.point.values) for run in runs)
    ledger = Ledger(
        "quick", "f", "cache", file.objective, file.maximize, space.fields, "command", entries
    )
    slots = make_slots(parallel, nproc=1, gpus=(), cpus=4, environment={})
    sweep = Sweep(
        folder, ledger, source, slots, command=TRAINER, say=say or print,
        poll_s=0.02, metrics_every_s=0.1,
    )  # fmt: skip
    return sweep, source


def main() -> int:
    sweep, _ = quick_sweep(
        read_sweep_file(sys.argv[1]),
        Path(sys.argv[2]),
        parallel=int(os.environ.get("QUICK_PARALLEL", "1")),
        say=lambda line: print(line, flush=True),
    )
    sweep.run()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
