"""Metrics of a run: one local JSON-lines file that survives any kill, and trackers beside it."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from pipeline.errors import StoreError
from pipeline.observe.settings import ObserveSettings
from pipeline.observe.trackers import open_tracker

__all__ = [
    "METRICS_FILE",
    "TIMING_PREFIXES",
    "CompositeSink",
    "JsonLinesSink",
    "MetricRecord",
    "MetricSink",
    "NullSink",
    "is_timing",
    "open_sinks",
    "read_metrics",
]

_log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"

TIMING_PREFIXES = ("throughput/", "data/", "memory/", "gpu/", "time/")
"""Keys that depend on the machine and the moment; two equal runs differ in these only."""


class MetricSink(Protocol):
    """Where the numbers of a step go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of one step; a step may come more than once with other keys."""

    def close(self) -> None:
        """Write what is still held back."""


@dataclass(frozen=True, slots=True)
class MetricRecord:
    """One line of `metrics.jsonl`."""

    step: int
    values: dict[str, float]

    def without_timing(self) -> MetricRecord:
        """Return the part that two runs of the same configuration have in common."""
        kept = {key: value for key, value in self.values.items() if not is_timing(key)}
        return MetricRecord(self.step, kept)


class NullSink:
    """Takes everything and keeps nothing: the sink of every rank but the first."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class JsonLinesSink:
    """Appends one JSON object a line: `step` first, then the keys in alphabetical order.

    The file always equals that of a run that was never killed: on resume the records after
    `resume_step` go, and so does a last line torn by the kill. Callers log a step before they
    commit the checkpoint of that step, otherwise the kill between the two would lose the line.

    Args:
        path: a local file; its folder is made.
        resume_step: the step of the checkpoint that the run continues from; none starts a new file.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None) -> None:
        """Cut the file back to `resume_step` and open it for appending.

        Raises:
            StoreError: the file cannot be read or written.
        """
        self._path = Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _cut_back(self._path, resume_step)
            self._file: TextIO = self._path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise self._refusal(error) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one record and hand it to the system at once: a kill loses nothing before it.

        Raises:
            StoreError: the disk rejects it; the file is the run's record, so the run stops.
        """
        try:
            self._file.write(_to_line(step, values))
            self._file.flush()
        except OSError as error:
            raise self._refusal(error) from error

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()

    def _refusal(self, error: OSError) -> StoreError:
        return StoreError(
            f"{self._path}: {error.strerror or error}",
            expected="a metrics file that can be written",
            do="free disk space or choose another output folder; the same command resumes",
        )


class CompositeSink:
    """Fans out to the local file, whose failure is an error, and trackers, whose failure is not.

    A tracker that raises is dropped after one warning: neither the training nor the other
    trackers suffer for a service that is down.
    """

    def __init__(self, required: MetricSink, trackers: Mapping[str, MetricSink]) -> None:
        """Take ownership of the sinks: `close` closes them."""
        self._required = required
        self._trackers = dict(trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log to the local file first, then to each tracker still alive."""
        self._required.log(step, values)
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(step, values)
            except Exception as error:
                _warn_dropped(name, error)
                del self._trackers[name]

    def close(self) -> None:
        """Close every sink, the local file whatever the trackers do."""
        try:
            for name, tracker in self._trackers.items():
                try:
                    tracker.close()
                except Exception as error:
                    _warn_dropped(name, error)
        finally:
            self._trackers.clear()
            self._required.close()


def open_sinks(
    settings: ObserveSettings,
    directory: str | Path,
    *,
    resume_step: int | None = None,
    config: Mapping[str, Any] | None = None,
    is_writer: bool = True,
) -> MetricSink:
    """Open `metrics.jsonl` in the local `directory`, and the trackers that were asked for.

    Args:
        settings: which trackers, and how they name the run.
        directory: a local folder; trackers that write files write below it.
        resume_step: the step of the checkpoint that the run continues from; none starts a new file.
        config: the resolved settings, shown by trackers beside the curves.
        is_writer: false on every rank but the first, which then gets a sink that keeps nothing.

    Raises:
        ConfigError: a tracker was asked for whose package is not installed, or the endpoint's port
            cannot be used.
        StoreError: the local file cannot be written.
    """
    if not is_writer:
        return NullSink()
    folder = Path(directory)
    trackers: dict[str, MetricSink] = {}
    for name in dict.fromkeys(settings.report_to):
        tracker = open_tracker(
            name, settings, folder, resume_step=resume_step, config=dict(config or {})
        )
        if tracker is not None:
            trackers[name] = tracker
    if settings.prometheus_port:
        from pipeline.observe.prometheus import PrometheusSink

        trackers["prometheus"] = PrometheusSink(
            port=settings.prometheus_port, host=settings.prometheus_host
        )
    return CompositeSink(JsonLinesSink(folder / METRICS_FILE, resume_step=resume_step), trackers)


def is_timing(key: str) -> bool:
    """Whether `key` depends on the machine and the moment, so that comparisons leave it out."""
    return key.startswith(TIMING_PREFIXES)


def read_metrics(path: str | Path) -> Iterator[MetricRecord]:
    """Yield the complete records of a metrics file, which another process may be writing."""
    for line in Path(path).read_bytes().splitlines(keepends=True):
        record = _from_line(line)
        if record is not None:
            yield record


def _warn_dropped(name: str, error: Exception) -> None:
    _log.warning(
        "tracker %s failed and is left out from here on; metrics.jsonl has every value: %s: %s",
        name,
        type(error).__name__,
        error,
    )


def _to_line(step: int, values: Mapping[str, float]) -> str:
    record: dict[str, object] = {"step": int(step)}
    for key in sorted(values):
        value = float(values[key])
        # JSON has no NaN; text that float() reads back keeps the file valid and the fact visible.
        record[key] = value if math.isfinite(value) else str(value)
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _from_line(line: bytes) -> MetricRecord | None:
    """Return the record of one line, or none if it is torn or not one of ours."""
    if not line.endswith(b"\n"):
        return None
    try:
        fields = json.loads(line)
        step = int(fields.pop("step"))
        return MetricRecord(step, {key: float(value) for key, value in fields.items()})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _cut_back(path: Path, resume_step: int | None) -> None:
    """Leave the records up to `resume_step`, byte for byte as they were written."""
    if not path.exists():
        return
    old = path.read_bytes()
    kept = b""
    if resume_step is not None:
        lines = [(line, _from_line(line)) for line in old.splitlines(keepends=True)]
        torn_inside = sum(record is None for _, record in lines[:-1])
        if torn_inside:
            _log.warning("%s: %d unreadable lines were removed", path, torn_inside)
        kept = b"".join(line for line, record in lines if record and record.step <= resume_step)
    if kept == old:
        return
    # Written beside and renamed: a second kill, now, must not take the good records along.
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(kept)
    os.replace(temporary, path)
