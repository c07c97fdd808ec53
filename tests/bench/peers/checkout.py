"""A checkout of another project: whether it is one, its commit, and modules loaded from it.

Their modules import frameworks that are not installed here (Megatron, Ray, Liger). `load` runs the
few files that hold the arithmetic, as they are, and gives empty stand-ins for what they import and
do not call.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.config.nearest import did_you_mean
from pipeline.errors import ConfigError

__all__ = ["Checkout", "Project", "load", "open_checkout", "parse"]


@dataclass(frozen=True, slots=True)
class Project:
    """Another project."""

    key: str
    """As in `--peer KEY=PATH`."""
    title: str
    repository: str
    marks: tuple[str, ...]
    """Files that the adapter reads and that no other project has."""


@dataclass(frozen=True, slots=True)
class Checkout:
    """A folder with a project's files."""

    project: Project
    folder: Path
    commit: str
    """Of the checkout's HEAD, or in words that it is not known."""

    @property
    def is_clean(self) -> bool:
        """Whether the commit says what the files are."""
        return self.commit.startswith("commit ") and len(self.commit.split()) == 2

    def __str__(self) -> str:
        """Return repository and commit."""
        return f"{self.project.title}: {self.project.repository}, {self.commit}"


def parse(given: Iterable[str], projects: Mapping[str, Project]) -> dict[str, Checkout]:
    """Return the checkouts of `KEY=PATH` options.

    Raises:
        ConfigError: an option that is no `KEY=PATH`, a key that is unknown or given twice, a path
            that is no checkout of that project.
    """
    found: dict[str, Checkout] = {}
    for option in given:
        key, equals, path = option.partition("=")
        if not equals or not path:
            raise ConfigError(
                f"--peer {option} names no folder",
                expected="--peer NAME=PATH",
                do=f"give the path of a checkout, as in --peer {key or 'distillkit'}=/path/to/it",
            )
        if key not in projects:
            known = ", ".join(projects)
            raise ConfigError(
                f"--peer {option} is of no known project",
                expected=f"one of {known}",
                do=did_you_mean(key, projects) or "use one of these names",
            )
        if key in found:
            raise ConfigError(
                f"--peer {key} is given twice",
                expected="one checkout of a project",
                do="leave one of them out",
            )
        found[key] = open_checkout(projects[key], Path(path))
    return found


def open_checkout(project: Project, folder: Path) -> Checkout:
    """Return a folder as a checkout of `project`.

    Raises:
        ConfigError: there is no such folder, or it has not the project's files.
    """
    folder = folder.expanduser()
    missing = [mark for mark in project.marks if not (folder / mark).is_file()]
    if missing:
        here = f"has no {missing[0]}" if folder.is_dir() else "is no folder"
        raise ConfigError(
            f"--peer {project.key}={folder}: the path {here}",
            expected=f"a checkout of {project.title} with {' and '.join(project.marks)}",
            do=f"run `git clone {project.repository}` and give the path of its folder",
        )
    return Checkout(project, folder.resolve(), _commit(folder.resolve()))


def _commit(folder: Path) -> str:
    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    # A folder without a repository of its own may lie inside another one.
    if top is None or Path(top).resolve() != folder:
        return "commit not known (no git repository)"
    changed = ", with local changes" if git("status", "--porcelain") else ""
    return f"commit {git('rev-parse', 'HEAD')}{changed}"


def load(
    checkout: Checkout,
    files: Mapping[str, str],
    *,
    absent: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, ModuleType]:
    """Run some of a checkout's files as the modules that they are, and nothing else of it.

    Args:
        checkout: where they are.
        files: by the module's full name its path, in the order in which they import each other.
        absent: stand-ins by the module's full name, with what is imported from them.

    Returns:
        The modules by name. They do not stay in `sys.modules`: an installed package of the same
        name is not touched.

    Raises:
        ConfigError: a file is missing, or does not run.
    """
    absent = absent or {}
    wanted = {name for full in (*files, *absent) for name in _with_parents(full)}
    before = {name: sys.modules.get(name) for name in wanted}
    made: dict[str, ModuleType] = {}
    try:
        for name in sorted(wanted, key=lambda name: name.count(".")):
            module = ModuleType(name)
            module.__path__ = []
            vars(module).update(absent.get(name, {}))
            sys.modules[name] = module
            if "." in name:
                parent, _, last = name.rpartition(".")
                setattr(sys.modules[parent], last, module)
        for name, path in files.items():
            made[name] = _run_file(checkout, name, path)
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
    return made


def _run_file(checkout: Checkout, name: str, path: str) -> ModuleType:
    file = checkout.folder / path
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise _not_this_version(checkout, f"there is no {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _not_this_version(checkout, f"{path} does not run: {error!r}") from error
    return module


def _not_this_version(checkout: Checkout, found: str) -> ConfigError:
    return ConfigError(
        f"{checkout}: {found}",
        expected="the files that BENCHMARKS.md names, of a commit near the one that it names",
        do="check that commit out, or change the adapter in tests/bench/peers",
    )


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]
