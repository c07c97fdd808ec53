"""Tasks by name, file or folder: which there are, and what they are known by."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import fingerprint
from pipeline.config.nearest import did_you_mean
from pipeline.errors import ConfigError

__all__ = ["Task", "check_known", "files_digest", "names_in", "sort_tasks"]


@dataclass(frozen=True, slots=True)
class Task:
    """A task, a group of tasks, or a file that defines one."""

    name: str
    """As the harness takes it."""
    digest: str
    """Of what is known of its files; the harness's own have none and go by its version."""


def files_digest(path: Path) -> str:
    """Return a digest of task files, and of the size and time of the data files they name."""
    files = [path] if path.is_file() else sorted(path.rglob("*.y*ml"))
    known = []
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        words = {word.strip("\"'[]{},") for word in text.split()}
        data = [Path(word) for word in sorted(words) if "." in word and Path(word).is_file()]
        known.append([text, [[str(one), *_size_and_time(one)] for one in data]])
    return fingerprint(known)


def _size_and_time(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def sort_tasks(tasks: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Part tasks into local files or folders and names of the harness."""
    local, named, mistakes = [], [], []
    for task in tasks:
        path = Path(task).expanduser()
        if path.suffix in (".yaml", ".yml") or os.sep in task or path.is_dir():
            if path.exists():
                local.append(path)
            else:
                mistakes.append(
                    f"tasks: found {task}, expected an existing YAML file or folder of them, or "
                    "the name of a task of the harness"
                )
        else:
            named.append(task)
    if mistakes:
        raise ConfigError(mistakes=mistakes)
    return local, named


def names_in(path: Path, manager: Any) -> list[str]:
    """Return what stands for the tasks of a file (its path) or of a folder (groups, or all tasks).

    Raises:
        ConfigError: it defines none.
    """
    root = path.resolve()
    if path.is_file():
        # Not read as YAML: a task may hold tags of the harness, such as !function.
        text = path.read_text(encoding="utf-8", errors="replace")
        names = [str(root)] if re.search(r"^(task|group):", text, re.MULTILINE) else []
    else:
        names = [
            name
            for name, entry in manager.task_index.items()
            if entry.yaml_path is not None and root in Path(entry.yaml_path).resolve().parents
        ]
    if not names:
        raise ConfigError(
            f"tasks: {path} defines no task",
            expected="YAML with `task:`, `dataset_path:`, `output_type:` and so on, as "
            "lm-evaluation-harness has it",
        )
    return sorted([name for name in names if name in manager.all_groups] or names)


def check_known(names: Sequence[str], manager: Any) -> None:
    """Reject names that are no task.

    Args:
        names: of tasks or groups.
        manager: the harness's own, with all of its tasks.

    Raises:
        ConfigError: with a near name for each.
    """
    unknown = [name for name in names if name not in manager.task_index]
    if not unknown:
        return
    mistakes = []
    for name in unknown:
        near = did_you_mean(name, manager.all_tasks)
        hint = f"; {near}" if near else ""
        mistakes.append(f"tasks: {name} is no task of the harness{hint} (all: `lm-eval ls tasks`)")
    raise ConfigError(mistakes=mistakes)
