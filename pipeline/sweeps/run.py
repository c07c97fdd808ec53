"""The sweep's loop: fill the slots, watch what runs, record what ended; stop in order."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from pipeline.amounts import format_duration
from pipeline.errors import DistillError, Interrupted
from pipeline.storage.folder_lock import FolderLock
from pipeline.sweeps.ledger import Entry, Ledger, State
from pipeline.sweeps.plan import PlannedRun
from pipeline.sweeps.process import (
    LOG_FILE,
    RunProcess,
    add_seconds,
    last_value,
    run_lock,
    seconds_spent,
)
from pipeline.sweeps.share import share_initial_student
from pipeline.sweeps.slots import Slot
from pipeline.sweeps.source import Outcome, RunSource

__all__ = ["Sweep", "SweepFailed"]

_log = logging.getLogger(__name__)
_STOP_S = 300.0
"""A step, an evaluation and a checkpoint of a large model take minutes."""


class SweepFailed(DistillError):
    """Some runs failed; the others are done."""


@dataclass
class _Active:
    """A run in its slot."""

    process: RunProcess
    slot: Slot
    looked: float
    step: int = 0
    giving_up: bool = False


class Sweep:
    """Runs a sweep to its end.

    Args:
        folder: of the sweep.
        ledger: with the runs that are known from the start.
        source: of the runs.
        slots: of GPUs or CPU threads; as many runs go on at a time.
        command: stage two without its flags.
        say: takes a line for people.
        progress_every_s: seconds between lines of progress.
        poll_s: seconds between looks at the processes.
        metrics_every_s: seconds between looks at what a run has logged.
    """

    def __init__(
        self,
        folder: Path,
        ledger: Ledger,
        source: RunSource,
        slots: Sequence[Slot],
        *,
        command: Sequence[str],
        say: Callable[[str], None],
        progress_every_s: float = 60.0,
        poll_s: float = 0.2,
        metrics_every_s: float = 2.0,
    ) -> None:
        """Keep the parts."""
        self.ledger = ledger
        self._folder = folder
        self._source = source
        self._free = list(slots)
        self._command = list(command)
        self._say = say
        self._every_s = progress_every_s
        self._poll_s = poll_s
        self._metrics_every_s = metrics_every_s
        self._active: list[_Active] = []
        self._blocked: list[tuple[PlannedRun, FolderLock]] = []
        self._stop_asked = 0

    def run(self) -> Ledger:
        """Do every run; the finished ones are read only.

        Raises:
            Interrupted: a signal came; the runs were stopped in order, the same command goes on.
        """
        spoke = time.monotonic()
        with self._signals():
            try:
                while not self._stop_asked:
                    self._fill()
                    if not self._active and not self._blocked:
                        break
                    time.sleep(self._poll_s)
                    for active in list(self._active):
                        self._look(active)
                    if time.monotonic() - spoke >= self._every_s:
                        spoke = time.monotonic()
                        self._speak()
            finally:
                self._stop_all()
        if self._stop_asked:
            raise Interrupted(
                "the sweep was asked to stop; its runs have written checkpoints",
                do="run the same command again; finished runs are not done again",
            )
        return self.ledger

    def _fill(self) -> None:
        for run, lock in list(self._blocked):
            if self._free and lock.try_take():
                self._blocked.remove((run, lock))
                self._begin(run, lock)
        while self._free and len(self._blocked) < len(self._free):
            proposed = self._source.next()
            if proposed is None:
                return
            lock = run_lock(proposed.folder)
            if lock.try_take():
                self._begin(proposed, lock)
            else:
                self._say(
                    f"{self._at(proposed)} is still being trained by {lock.holder()}, "
                    "which an earlier sweep left behind; waiting for it"
                )
                self._blocked.append((proposed, lock))

    def _begin(self, run: PlannedRun, lock: FolderLock) -> None:
        if run.finished:
            lock.release()
            self._end(run, "finished", known=True)
            return
        share_initial_student(run)
        slot = self._free.pop(0)
        process = RunProcess(run, self._command, slot.environment, lock)
        self._active.append(_Active(process, slot, looked=0.0))
        self._note(run, "running")
        where = "".join(f", {name}={value}" for name, value in slot.environment.items())
        self._say(f"{self._at(run)} started ({run.cost.steps} steps{where})")

    def _look(self, active: _Active) -> None:
        code = active.process.exit_code
        now = time.monotonic()
        if code is not None or now - active.looked >= self._metrics_every_s:
            active.looked = now
            self._judge(active)
        if code is None:
            return
        self._active.remove(active)
        self._free.append(active.slot)
        run = active.process.run
        add_seconds(run.folder, active.process.seconds)
        if code == 0 and run.finished:
            self._end(run, "finished")
        elif active.giving_up:
            self._end(run, "pruned")
        elif not self._stop_asked:
            self._end(run, "failed", error=active.process.failure())

    def _judge(self, active: _Active) -> None:
        """Read what the run has logged, and ask it to end where the search gives it up."""
        run, key = active.process.run, self.ledger.objective
        for record in active.process.new_records():
            active.step = max(active.step, record.step)
            value = record.values.get(key)
            # Step 0 is the untrained student, the last one is the result itself.
            if value is None or not 0 < record.step < run.cost.steps or active.giving_up:
                continue
            if self._source.report(run, record.step, value):
                active.giving_up = True
                self._say(f"{self._at(run)} given up at step {record.step}: {key} {value:.4g}")
                active.process.stop()

    def _end(
        self, run: PlannedRun, outcome: Outcome, *, error: str = "", known: bool = False
    ) -> None:
        key = self.ledger.objective
        value = last_value(run.folder, key) if outcome != "failed" else None
        if outcome == "finished" and value is None:
            error = f"logged no {key}"
        elif value is not None and not math.isfinite(value):
            value, error = None, f"{key} is not finite: the run diverged"
        self._source.done(run, outcome, value)
        self._note(run, outcome, value, error)
        spent = seconds_spent(run.folder)
        if outcome == "failed":
            self._say(f"{self._at(run)} FAILED: {error} (log: {run.folder / LOG_FILE})")
        elif outcome == "finished":
            shown = error if value is None else f"{key} {value:.4f}"
            how = "was finished before" if known else f"finished in {format_duration(spent)}"
            self._say(f"{self._at(run)} {how}: {shown}")

    def _note(
        self,
        run: PlannedRun,
        state: State,
        value: float | None = None,
        error: str = "",
    ) -> None:
        old = self.ledger.entry(run.name) or Entry(run.name, run.point.label, run.point.values)
        entry = replace(
            old,
            state=state,
            objective=value,
            seconds=seconds_spent(run.folder) or None,
            error=error,
        )
        self.ledger = self.ledger.with_entry(entry)
        self.ledger.write(self._folder)

    def _at(self, run: PlannedRun) -> str:
        names = [entry.name for entry in self.ledger.entries]
        number = names.index(run.name) + 1 if run.name in names else len(names) + 1
        return f"[{number}/{self._source.total}] {run.point.label}:"

    def _speak(self) -> None:
        for active in self._active:
            run = active.process.run
            self._say(f"{self._at(run)} step {active.step} of {run.cost.steps}")

    def _stop_all(self) -> None:
        for active in self._active:
            active.process.stop()
        deadline = time.monotonic() + _STOP_S
        for active in self._active:
            while active.process.exit_code is None:
                if self._stop_asked > 1 or time.monotonic() > deadline:
                    active.process.kill()
                time.sleep(self._poll_s)
            add_seconds(active.process.run.folder, active.process.seconds)
            # The next call finds finished what ended meanwhile, and reports it to the source.
            self._note(active.process.run, "waiting")
        self._active.clear()
        for _, lock in self._blocked:
            lock.release()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, SIGINT and SIGHUP stop the runs in order; a second one kills them."""

        def ask(number: int, _frame: FrameType | None) -> None:
            self._stop_asked += 1
            if self._stop_asked == 1:
                self._say(
                    f"{signal.Signals(number).name}: the runs end their step and write a "
                    "checkpoint; once more ends them at once"
                )

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.signal(number, ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
