"""Runs that begin with the same weights make them once: the pruned student is linked."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import yaml

from pipeline.sweeps.plan import PlannedRun
from pipeline.sweeps.process import POINT_FILE

__all__ = ["share_initial_student"]

_INIT, _MARK = "init", "made_from.json"


def share_initial_student(run: PlannedRun) -> bool:
    """Link the initial student of another run of the sweep, where one was made of the same.

    Reconstructing the embedded default's layers takes longer than fifty of its steps. A folder
    that does not fit after all is no harm: stage two compares its mark, and makes its own.

    Returns:
        Whether one was linked.
    """
    settings = run.settings.model_dump(mode="json")
    target = run.folder / _INIT
    if target.exists() or settings["student"]["keep_layers"] is None:
        return False
    for point in sorted(run.folder.parent.glob(f"*/{POINT_FILE}")):
        made = point.parent / _INIT
        if not (made / _MARK).exists() or _begins(point) != _begins_with(settings):
            continue
        temporary = run.folder / f"{_INIT}.{uuid.uuid4().hex}.partial"
        try:
            shutil.copytree(made, temporary, copy_function=_link)
            temporary.rename(target)
        except OSError:
            return False  # it makes its own
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return True
    return False


def _begins(point: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        return _begins_with(yaml.safe_load(point.read_text(encoding="utf-8")))
    return {}


def _begins_with(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the initial weights; which of them learn does not."""
    names = ("model", "revision", "keep_layers", "reconstruct", "reconstruct_tokens")
    chosen = {name: settings["student"][name] for name in names}
    return {**chosen, "cache_dir": settings["cache_dir"]}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
