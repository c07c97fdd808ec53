"""The stages as functions: the same settings, files and results as from a shell."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.api.process import run_stage
from pipeline.api.results import SweepResult, TrainedStudent
from pipeline.api.settings import StudentRun, TeacherRun
from pipeline.config import parse_command
from pipeline.config.schema import Settings
from pipeline.errors import ConfigError, RowsQuarantined
from pipeline.student.engine.launch import torchrun_arguments

if TYPE_CHECKING:
    from pipeline.cache.io.reader import Cache

__all__ = ["cache_teacher", "sweep", "train_student"]

SettingsT = TypeVar("SettingsT", bound=Settings)
Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def cache_teacher(config: Files = (), *, python: str = sys.executable, **options: Any) -> Cache:
    """Run stage one and open the cache; a finished cache is opened at once.

    Args:
        config: YAML or JSON files, the later ones above the earlier.
        python: interpreter of stage one's environment, where it is another one.
        options: the flags of `cache-teacher` (`stages/README.md`) without their dashes:
            `teacher_model="..."`, `capture={"top_k": 32}`, `**{"corpus.max_length": 2048}`.

    Raises:
        ConfigError: mistakes in the settings, all at once, before anything starts.
        StageFailed: any other error of the stage, with its message.
    """
    from pipeline.cache.io.reader import open_cache

    arguments = _arguments(config, options)
    run = _parsed(TeacherRun, arguments)
    run_stage("stages.cache_teacher", arguments, python=python, allowed=[RowsQuarantined.exit_code])
    return open_cache(run.cache_dir)


def train_student(
    config: Files = (), *, nproc: int = 1, python: str = sys.executable, **options: Any
) -> TrainedStudent:
    """Run stage two; a finished run is returned at once.

    Args:
        config: YAML or JSON files, the later ones above the earlier.
        nproc: processes of this machine.
        python: interpreter of stage two's environment, where it is another one.
        options: the flags of `train-student` without their dashes, as in `cache_teacher`.

    Raises:
        ConfigError: mistakes in the settings, all at once, before anything starts.
        StageFailed: any other error of the stage, with its message.
    """
    arguments = _arguments(config, options)
    run = _parsed(StudentRun, arguments)
    launcher: list[str] = []
    if nproc > 1:
        # One process says what is wrong once; a launcher says it once a rank.
        run_stage("stages.train_student", [*arguments, "--check"], python=python)
        launcher = torchrun_arguments(nproc)
    run_stage("stages.train_student", arguments, python=python, launcher=launcher)
    return TrainedStudent(Path(run.output.output_dir))


def sweep(
    points: Mapping[str, Any] | str | os.PathLike[str],
    *,
    sweep_dir: str | os.PathLike[str],
    python: str = sys.executable,
    **options: Any,
) -> SweepResult:
    """Train many students from one cache; a finished sweep is returned at once.

    Args:
        points: a sweep file, or its content: `base`, `cache_dir`, `overrides`, and one of `grid`,
            `points`, `search`.
        sweep_dir: the sweep's folder.
        python: interpreter of stage two's environment, where it is another one.
        options: the flags of `sweep` without their dashes: `parallel=2`.

    Raises:
        ConfigError: mistakes in the file or in one of its points.
        StageFailed: some runs failed; the others are done.
    """
    folder = Path(sweep_dir)
    if isinstance(points, Mapping):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "sweep-file.json"
        file.write_text(json.dumps(_plain(points), indent=1), encoding="utf-8")
    else:
        file = Path(points)
    arguments = ["--sweep", str(file), "--sweep_dir", str(folder), *_arguments((), options)]
    run_stage("stages.sweep", arguments, python=python)
    return SweepResult(folder)


def _arguments(config: Files, options: Mapping[str, Any]) -> list[str]:
    """Return files and options as the stage's command line."""
    files = [config] if isinstance(config, str | os.PathLike) else list(config)
    arguments = [part for file in files for part in ("--config", os.fspath(file))]
    for name, value in options.items():
        arguments += _flag(name, value)
    return arguments


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [part for key, inner in value.items() for part in _flag(f"{name}.{key}", inner)]
    if value is None:
        return [f"--{name}=none"]
    if isinstance(value, bool):
        return [f"--{name}={str(value).lower()}"]
    if isinstance(value, list | tuple):
        return [f"--{name}={json.dumps(_plain(value))}"]
    return [f"--{name}={value}"]


def _plain(value: Any) -> Any:
    """Return mappings, lists and paths as JSON takes them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _parsed(model: type[SettingsT], arguments: Sequence[str]) -> SettingsT:
    """Return the settings as the stage would read them.

    Raises:
        ConfigError: with all mistakes.
    """
    if any(part in ("-h", "--help") for part in arguments):
        raise ConfigError("--help in a function call", expected="settings")
    return parse_command(model, arguments, prog="", description="").settings
