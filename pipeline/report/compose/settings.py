"""The resolved configuration of each stage, and where those of the runs differ."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.cache.io.reader import Cache
from pipeline.report.compose.runs import Run
from pipeline.report.data.runs import SettingDifference

__all__ = ["setting_differences", "settings_of"]

_PLACES = ("output.output_dir", "observe.")
"""Settings that say where a run writes, not what it is."""


def settings_of(cache: Cache, runs: Sequence[Run]) -> dict[str, str]:
    """Return the resolved configuration of each stage, as YAML."""
    settings: dict[str, str] = {}
    # A cache that was merged or sliced has no single configuration.
    with contextlib.suppress(FileNotFoundError):
        settings["cache-teacher"] = cache.store.read("_meta/config.yaml").decode()
    texts = {f"train-student ({run.folder.name})": run.config_text for run in runs}
    return settings | {name: text for name, text in texts.items() if text}


def setting_differences(runs: Sequence[Run]) -> tuple[SettingDifference, ...]:
    """Return the settings in which the runs differ, those of their folders left out."""
    flat = {run.folder.name: _flat(run.config) for run in runs}
    fields = dict.fromkeys(name for settings in flat.values() for name in settings)
    return tuple(
        SettingDifference(field, {name: settings.get(field, "") for name, settings in flat.items()})
        for field in fields
        if not field.startswith(_PLACES)
        and len({settings.get(field) for settings in flat.values()}) > 1
    )


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "none" if value is None else str(value)
    return flat
