"""Trackers that accelerate knows, by their names there; the only file that imports accelerate."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

__all__ = [
    "check_accelerate_tracker",
    "install_advice",
    "open_accelerate_tracker",
    "registered_trackers",
]

_RUN_NAMED = {"clearml": "task_name", "swanlab": "experiment_name"}
"""What the class calls the run's name, where it takes one; the project's is the first argument."""


def install_advice(package: str) -> str:
    """Return the command that installs a package where this process would look for it."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return f"run `{python} -m pip install {package}`"


def registered_trackers() -> list[str]:
    """Return the names in accelerate's registry, those registered by the user included."""
    return sorted(_tracking().LOGGER_TYPE_TO_CLASS)


def check_accelerate_tracker(name: str) -> None:
    """Reject a tracker that is not in the registry, or whose package is missing.

    Raises:
        ConfigError: with what is known, or what to install.
    """
    tracking = _tracking()
    if name not in tracking.LOGGER_TYPE_TO_CLASS:
        raise ConfigError(
            f"report_to: found {name!r}, which no tracker is called",
            expected="any of " + ", ".join(registered_trackers()),
        )
    # A class that the user has registered has nothing to be installed that accelerate knows of.
    known = {str(kind) for kind in tracking.LoggerType}
    if name in known and name not in map(str, tracking.get_available_trackers()):
        raise ConfigError(
            f"report_to: {name} was asked for, but is not installed",
            expected="the tracker's package",
            do=f"{install_advice(name.replace('_', '-'))}, or leave {name} out of report_to",
        )


def open_accelerate_tracker(
    name: str, *, project: str, run_name: str, folder: Path, config: Mapping[str, Any]
) -> Any:
    """Start a tracker and return it: an object with `log(values, step)` and `finish()`.

    A resumed run starts another entry: accelerate's classes have no common way to continue one.
    """
    tracking = _tracking()
    kind = tracking.LOGGER_TYPE_TO_CLASS[name]
    options = {_RUN_NAMED[name]: run_name} if name in _RUN_NAMED else {}
    place = [str(folder)] if kind.requires_logging_directory else []
    tracker = kind(project, *place, **options)
    # Only the first rank is here. Asking accelerate would make it set up its own process state.
    tracker.main_process_only = False
    tracker.start()
    tracker.store_init_configuration(_flat(config))
    return tracker


def _tracking() -> Any:
    try:
        from accelerate import tracking
    except ImportError:
        raise ConfigError(
            "report_to: accelerate is not installed",
            expected="it, for all trackers but tensorboard, wandb, trackio and mlflow",
            do=f"{install_advice('accelerate')}, or leave the tracker out of report_to",
        ) from None
    # Its own logger asks for accelerate's process state as well.
    if not isinstance(tracking.logger, _Logger):
        tracking.logger = _Logger(logging.getLogger("accelerate.tracking"), {})
    return tracking


class _Logger(logging.LoggerAdapter[logging.Logger]):
    """A plain logger with the one method that accelerate adds."""

    def __init__(self, logger: logging.Logger, extra: Mapping[str, object]) -> None:
        """Wrap a logger."""
        super().__init__(logger, extra)
        self._warned: set[str] = set()

    def warning_once(self, message: str, *args: object, **options: Any) -> None:
        """Warn, the first time."""
        if message not in self._warned:
            self._warned.add(message)
            self.warning(message, *args, **options)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings by dotted name; what is no plain value as text."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            plain = value is None or isinstance(value, str | int | float)
            flat[f"{prefix}{key}"] = value if plain else str(value)
    return flat
