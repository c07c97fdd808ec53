"""A search by Optuna, stored on disk: what it proposes and learns, what a kill left open."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import fingerprint
from pipeline.errors import ConfigError, DistillError
from pipeline.program import how_to_install
from pipeline.sweeps.file import SearchSettings
from pipeline.sweeps.ledger import Entry, State
from pipeline.sweeps.plan import PlannedRun
from pipeline.sweeps.process import seconds_spent
from pipeline.sweeps.source import Outcome
from pipeline.sweeps.space import Range, Space

__all__ = ["STUDY_FILE", "SearchSource", "check_optuna"]

_log = logging.getLogger(__name__)

STUDY_FILE = "study.log"
_RETRIED = "retried"
_RUN = "run"


def check_optuna() -> None:
    """Reject a search where Optuna is not installed.

    Raises:
        ConfigError: with how to install it.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ConfigError(
            "search: Optuna is not installed",
            expected="it in the environment of stage two",
            do=f"{how_to_install('student')}, or use a grid or a list, which need nothing",
        ) from None


class SearchSource:
    """Runs that Optuna proposes.

    The study is a journal file beside the runs. A trial that a kill left running is taken up again
    under its own number; one that failed is tried once more by the next call of the same sweep.

    Args:
        folder: the sweep's.
        space: checked; its axes are what is searched.
        search: how.
        objective: name of the metric, part of the study's name.
        maximize: whether larger is better.
        identity: what else decides an objective: the cache and the base.
        plan: a point's run; may raise.
    """

    def __init__(
        self,
        folder: Path,
        *,
        space: Space,
        search: SearchSettings,
        objective: str,
        maximize: bool,
        identity: str,
        plan: Callable[[Any], PlannedRun],
    ) -> None:
        """Open the study, or make it."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        self._space, self._search, self._plan = space, search, plan
        self._optuna: Any = optuna
        axes = {name: repr(axis) for name, axis in space.axes.items()}
        # A study cannot change its space; a changed file starts another one in the same journal.
        name = fingerprint([axes, objective, maximize, identity, search.sampler, search.seed])[:12]
        self._study: Any = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / STUDY_FILE))),
            study_name=name,
            direction="maximize" if maximize else "minimize",
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(seed=search.seed),
            pruner=_pruner(optuna, search),
        )
        self._open: dict[str, Any] = {}
        self.rejected: list[tuple[str, str]] = []
        """(label, reason) of proposed points that could not be planned."""
        self._orphans = self._running()
        self._retry_failed()
        self.total = search.trials

    def ended(self, runs_dir: Path) -> list[Entry]:
        """Return the entries of the trials that earlier calls brought to their end, in order.

        Args:
            runs_dir: the folder of the runs' folders.
        """
        states: dict[Any, State] = {
            self._optuna.trial.TrialState.COMPLETE: "finished",
            self._optuna.trial.TrialState.PRUNED: "pruned",
        }
        entries: dict[str, Entry] = {}
        for trial in self._study.get_trials(deepcopy=False, states=tuple(states)):
            point = self._space.point(self._values(trial))
            name = str(trial.user_attrs[_RUN])
            entries[name] = Entry(
                name, point.label, point.values, states[trial.state], trial.value,
                seconds_spent(runs_dir / name) or None,
            )  # fmt: skip
        return list(entries.values())

    def next(self) -> PlannedRun | None:
        """Return the run of an open trial, or of a new one while there are trials left."""
        while True:
            if self._orphans:
                trial = self._optuna.trial.Trial(self._study, self._orphans.pop(0))
            elif self._supervised() < self._search.trials:
                self._seed_sampler()
                trial = self._study.ask()
            else:
                return None
            values = self._values(trial)
            try:
                point = self._space.point(values)
                run = self._plan(point)
            except DistillError as error:
                self.rejected.append((json.dumps(values, default=str), str(error)))
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                continue
            trial.set_user_attr(_RUN, run.name)
            if run.name in self._open:
                # Another trial is at this very point now; its value will serve for both.
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                continue
            self._open[run.name] = trial
            return run

    def report(self, run: PlannedRun, step: int, value: float) -> bool:
        """Hand the value to the pruner."""
        trial = self._open[run.name]
        if value == value:
            trial.report(value, step)
        return bool(trial.should_prune())

    def done(self, run: PlannedRun, outcome: Outcome, value: float | None) -> None:
        """Tell the study."""
        trial = self._open.pop(run.name)
        state = self._optuna.trial.TrialState
        if outcome == "pruned":
            self._study.tell(trial, state=state.PRUNED)
        elif outcome == "finished" and value is not None and value == value:
            self._study.tell(trial, value)
        else:
            self._study.tell(trial, state=state.FAIL)

    def _values(self, trial: Any) -> dict[str, Any]:
        """Return a trial's values: drawn where it is new, as they were where it has ended."""
        # By name, so that a file whose lines change places draws the same.
        drawn = {name: self._suggest(trial, name) for name in sorted(self._space.axes)}
        return {name: drawn[name] for name in self._space.axes}

    def _suggest(self, trial: Any, name: str) -> Any:
        axis = self._space.axes[name]
        if isinstance(axis, Range):
            if axis.integer:
                step = max(1, round(axis.step or 1))
                return trial.suggest_int(
                    name, round(axis.low), round(axis.high), log=axis.log, step=step
                )
            drawn = trial.suggest_float(name, axis.low, axis.high, log=axis.log, step=axis.step)
            # Six digits can be read, typed again, and lie within the range.
            return min(max(float(f"{drawn:.6g}"), axis.low), axis.high)
        # Optuna stores simple values only; lists and mappings go by their place.
        if all(value is None or isinstance(value, (bool, int, float, str)) for value in axis):
            return trial.suggest_categorical(name, axis)
        return axis[trial.suggest_categorical(name, list(range(len(axis))))]

    def _seed_sampler(self) -> None:
        """Draw by the number of the trial, so that a search that was killed proposes the same."""
        seed = self._search.seed * 1_000_003 + len(self._study.get_trials(deepcopy=False))
        samplers = self._optuna.samplers
        self._study.sampler = (
            samplers.RandomSampler(seed=seed)
            if self._search.sampler == "random"
            else samplers.TPESampler(
                seed=seed, n_startup_trials=self._search.startup_trials, constant_liar=True
            )
        )

    def _running(self) -> list[int]:
        state = self._optuna.trial.TrialState
        trials = self._study.get_trials(deepcopy=False, states=(state.RUNNING,))
        return [trial._trial_id for trial in trials]

    def _retry_failed(self) -> None:
        """Queue each failed trial's point again; its first try counts no more."""
        state = self._optuna.trial.TrialState
        retried = list(self._study.user_attrs.get(_RETRIED, []))
        for trial in self._study.get_trials(deepcopy=False, states=(state.FAIL,)):
            if trial.number not in retried and set(trial.params) == set(self._space.axes):
                # Noted first: a kill between the two loses one retry, not the count.
                retried.append(trial.number)
                self._study.set_user_attr(_RETRIED, retried)
                self._study.enqueue_trial(trial.params)

    def _supervised(self) -> int:
        retried = self._study.user_attrs.get(_RETRIED, [])
        trials = self._study.get_trials(deepcopy=False)
        return sum(t.state.name != "WAITING" and t.number not in retried for t in trials)


def _pruner(optuna: Any, search: SearchSettings) -> Any:
    if search.pruner == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=search.startup_trials, n_warmup_steps=search.warmup_steps
        )
    if search.pruner == "halving":
        # Its own unit of resource is the step of the first report.
        return optuna.pruners.SuccessiveHalvingPruner(min_resource="auto", reduction_factor=3)
    return optuna.pruners.NopPruner()
