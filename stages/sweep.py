"""Many students from one cache: every point of a sweep file is a run; ends with a report."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.api.settings import StudentRun, TeacherRun
from pipeline.config import Settings, fingerprint, option, parse_command
from pipeline.config.command import command_line
from pipeline.data.mixture.settings import CacheShare, cache_urls
from pipeline.errors import CacheError, ConfigError, DistillError, RowsQuarantined, run_command
from pipeline.program import command_name, module_name
from pipeline.sweeps.file import SweepFile, read_sweep_file
from pipeline.sweeps.space import Point, Space

if TYPE_CHECKING:
    from pipeline.sweeps.ledger import Ledger
    from pipeline.sweeps.plan import PlannedRun, Planner
    from pipeline.sweeps.search import SearchSource

__all__ = ["SweepRun", "main", "read_space"]

PROG = command_name("stages.sweep")


class SweepRun(Settings):
    """Which sweep, where it goes, and how many runs at a time."""

    sweep: str = option("stages/configs/sweeps/temperature.yaml", "the sweep file")
    sweep_dir: str | None = option(
        None, "folder of runs, study and report; none takes runs/sweeps/<name of the file>"
    )
    parallel: int = option(
        1, "runs at a time: each on GPUs of its own, or with a share of the CPU's threads", ge=1
    )
    nproc: int = option(1, "processes of one run", ge=1)
    teacher_python: str = option(sys.executable, "interpreter of stage one's environment")
    progress_every_s: float = option(60, "seconds between two lines of progress", gt=0)

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return Path(self.sweep_dir or f"runs/sweeps/{Path(self.sweep).stem}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep to its end; the same command again does what is missing."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parse_command(
        SweepRun,
        arguments,
        prog=PROG,
        description=__doc__ or "",
        switches={"dry_run": "print the points and what each would cost, and exit"},
        examples=[
            f"{PROG} --sweep stages/configs/sweeps/temperature.yaml --dry-run",
            f"{PROG} --sweep stages/configs/sweeps/temperature.yaml --parallel 2",
        ],
    )
    options, dry = command.settings, "dry_run" in command.switches
    file = read_sweep_file(options.sweep, StudentRun)
    space = read_space(file)
    points = space.corners() if file.search else space.points()
    cache_dir = _run_settings(points[0].settings if points else space.base).cache_dir
    from pipeline.observe.logs import configure_logging
    from pipeline.observe.trackers import check_trackers
    from pipeline.sweeps.objective import unmeasured
    from pipeline.sweeps.plan import Planner

    configure_logging("warning")
    if file.search is not None:
        from pipeline.sweeps.search import check_optuna

        check_optuna()
    named = (point.settings.observe.report_to for point in points)  # type: ignore[attr-defined]
    check_trackers(list(dict.fromkeys(itertools.chain(*named))))
    planner = Planner(cache_dir, options.folder / "runs", nproc=options.nproc)
    mistakes = [*space.mistakes, *unmeasured(file.objective, points)]
    if file.teacher_config is not None and len(cache_urls(cache_dir)) > 1:
        mistakes.append(
            f"teacher_config: found {file.teacher_config} with a mixture of caches, expected none: "
            "stage one makes one cache"
        )
    try:
        runs = planner.plan_all(points, mistakes)
    except CacheError as error:
        if file.teacher_config is None:
            raise
        _check_before_the_teacher(file.teacher_config, points)
        if dry:
            _print_points_only(points, error)
            return 0
        (cache_url,) = cache_urls(cache_dir)
        _make_cache(options.teacher_python, file.teacher_config, cache_url)
        runs = planner.plan_all(points)
    objective = _logged_objective(file.objective, points, cache_dir)
    if dry:
        _print_costs(runs, file)
        return 0
    task = _Task(options, file, space, planner, cache_dir, objective)
    return _run(task, runs, command_line(PROG, arguments))


def read_space(file: SweepFile) -> Space:
    """Return the space of a sweep file over its base, with its cache; with its mistakes.

    Raises:
        ConfigError: the base itself is rejected.
    """
    base = parse_command(
        StudentRun, ["--config", file.base], prog="the base of the sweep", description=""
    )
    settings = base.settings
    if file.cache_dir is not None:
        settings = settings.model_copy(update={"cache_dir": file.cache_dir})
    return Space(settings, file)


def _run_settings(settings: Settings) -> StudentRun:
    assert isinstance(settings, StudentRun)
    return settings


@dataclass(frozen=True, slots=True)
class _Task:
    """What is swept, and where."""

    options: SweepRun
    file: SweepFile
    space: Space
    planner: Planner
    cache_dir: str | tuple[CacheShare, ...]
    """The first point's; others may give its caches other weights."""
    objective: str
    """By the name under which the runs log it."""


def _logged_objective(
    objective: str, points: Sequence[Point], cache_dir: str | tuple[CacheShare, ...]
) -> str:
    from pipeline.data.mixture.caches import open_caches
    from pipeline.sweeps.objective import logged_objective

    cache = open_caches(cache_dir)
    rule = cache.heldout_rule if objective.startswith("heldout/") else cache.rule
    return logged_objective(objective, points, sampled=rule is not None)


def _run(task: _Task, runs: list[PlannedRun], shown: str) -> int:
    from pipeline.storage.parallel import usable_cores
    from pipeline.sweeps.ledger import Entry, Ledger
    from pipeline.sweeps.plan import check_resources
    from pipeline.sweeps.run import Sweep
    from pipeline.sweeps.slots import make_slots, visible_gpus
    from pipeline.sweeps.source import ListSource
    from stages.distill import trainer

    options, file = task.options, task.file
    slots = make_slots(
        options.parallel,
        nproc=options.nproc,
        gpus=visible_gpus(),
        cpus=usable_cores(),
        environment=os.environ,
    )
    listed = file.search is None
    check_resources(runs if listed else runs[:1], parallel=options.parallel, folder=options.folder)
    search = None if listed else _search(task)
    if search is None:
        entries = [Entry(run.name, run.point.label, run.point.values) for run in runs]
    else:
        entries = search.ended(options.folder / "runs")
    first = _run_settings(runs[0].settings)
    ledger = Ledger(
        name=Path(options.sweep).stem,
        file=options.sweep,
        cache_dir=first.model_dump(mode="json")["cache_dir"],
        teachers=first.data.teachers,
        objective=task.objective,
        maximize=file.maximize,
        fields=task.space.fields,
        command=shown,
        entries=tuple(entries),
    )
    ledger.write(options.folder)
    sweep = Sweep(
        options.folder,
        ledger,
        search or ListSource(runs),
        slots,
        command=trainer(options.nproc),
        say=lambda line: print(line, flush=True),
        progress_every_s=options.progress_every_s,
    )
    print(f"sweep     {options.folder}, objective {task.objective}", flush=True)
    done = sweep.run()
    rejected = [] if search is None else search.rejected
    return _finish(options.folder, done, rejected)


def _search(task: _Task) -> SearchSource:
    from pipeline.data.mixture.caches import caches_of, open_caches
    from pipeline.sweeps.search import SearchSource

    search = task.file.search
    assert search is not None
    base = task.space.base.model_dump(mode="json", exclude={"output", "observe", "cache_dir"})
    caches = caches_of(open_caches(task.cache_dir))
    read: list[object] = [cache.manifest.identity_digest for cache in caches]
    if not isinstance(task.cache_dir, str):
        read += [[share.tag, share.weight] for share in task.cache_dir]
    return SearchSource(
        task.options.folder,
        space=task.space,
        search=search,
        objective=task.objective,
        maximize=task.file.maximize,
        identity=fingerprint([*read, base]),
        plan=task.planner.plan,
    )


def _finish(folder: Path, ledger: Ledger, rejected: Sequence[tuple[str, str]]) -> int:
    """Write the report of what finished; fail with a list of what did not."""
    from pipeline.sweeps.run import SweepFailed
    from stages.report import write_sweep_report

    if ranked := ledger.ranked():
        page = write_sweep_report(folder)
        print(f"report    {page}")
        print(f"best      {folder / 'runs' / ranked[0].name / 'model'}   ({ranked[0].label})")
    failed = [(e.label, e.error) for e in ledger.entries if e.state == "failed"]
    failed += list(rejected)
    if failed:
        lines = "".join(f"\n  - {label}: {error.rstrip('.')}" for label, error in failed)
        raise SweepFailed(
            f"{len(failed)} of {len(ledger.entries) + len(rejected)} runs failed:{lines}\n"
            "the others are done",
            do="correct what the messages say and run the same command again; finished runs are "
            "not done again",
        )
    return 0


def _check_before_the_teacher(config: str, points: Sequence[Point]) -> None:
    """Reject what the cache to be made could not serve, before hours of the teacher."""
    from pipeline.student.compatibility import check_compatibility

    teacher = parse_command(TeacherRun, ["--config", config], prog="stage one", description="")
    grid = teacher.settings.capture.temperatures
    mistakes: dict[str, None] = {}
    for point in points:
        settings = point.settings
        assert isinstance(settings, StudentRun)
        # Of the tail only the finished cache knows whether it fits.
        loss = settings.loss.model_copy(update={"tail": "auto", "control_variate": None})
        try:
            check_compatibility(loss, settings.data, grid=grid, rule=None)
        except ConfigError as error:
            mistakes |= dict.fromkeys(f"{point.label}: {line}" for line in error.mistakes)
    if mistakes:
        raise ConfigError(mistakes=list(mistakes))


def _make_cache(python: str, config: str, cache_url: str) -> None:
    print("cache     is not complete; the teacher reads the corpus once", flush=True)
    command = [
        python,
        "-m",
        module_name("stages.cache_teacher"),
        "--config",
        config,
        "--cache_dir",
        cache_url,
    ]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, RowsQuarantined.exit_code):
        raise DistillError(
            f"cache-teacher ended with exit code {code}",
            do="correct what it says above and run the same command again",
        )


def _print_points_only(points: Sequence[Point], reason: DistillError) -> None:
    print(f"{len(points)} points; what they cost is known once there is a cache ({reason.found})\n")
    for point in points:
        print(f"  {point.label}")


def _print_costs(runs: Sequence[PlannedRun], file: SweepFile) -> None:
    """Print the points, their cost and the teacher forward passes avoided; start nothing."""
    if file.search is not None:
        print(
            f"search    {file.search.trials} trials by Optuna ({file.search.sampler}); its corners:"
        )
    width = max(len(run.point.label) for run in runs)
    print(f"{'point':<{width}}  {'steps':>7}  {'tokens':>11}  {'forward passes':>14}  state")
    for run in runs:
        cost = run.cost
        state = "finished" if run.finished else "begun" if run.folder.exists() else "new"
        print(
            f"{run.point.label:<{width}}  {cost.steps:>7}  {cost.tokens:>11,}  "
            f"{cost.teacher_sequences:>14,}  {state}  {run.folder}"
        )
    if file.search is not None:
        # Of a search the corners alone are known; its trials lie between them.
        largest = max((run.cost for run in runs), key=lambda cost: cost.tokens)
        waiting, many = [largest] * file.search.trials, f"at most {file.search.trials} trials"
    else:
        waiting = [run.cost for run in runs if not run.finished]
        many = f"{len(waiting)} of {len(runs)}"
    print(
        f"\nto be run {many}: {sum(c.steps for c in waiting):,} steps, "
        f"{sum(c.tokens for c in waiting):,} tokens; teacher forward passes avoided, one a "
        f"sequence: {sum(c.teacher_sequences for c in waiting):,}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
