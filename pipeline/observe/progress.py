"""Progress of a long loop: a bar on a terminal, a log line every few seconds elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

__all__ = ["Progress", "format_duration", "format_quantity"]

_log = logging.getLogger(__name__)

_WINDOW_LINES = 12
"""The rate looks back over this many lines (a minute at the default of 5 s), so that a slow
first step (compilation, a cold page cache) does not spoil the ETA for hours."""


class Progress:
    """Counts `done` towards `total` and shows it; a context manager.

    Args:
        total: how many units the whole work has, those done before included; none if unknown.
        unit: what is counted, in the plural ("steps", "sequences").
        description: a word in front of the numbers.
        every_s: seconds between lines where there is no terminal.
        initial: units done by an earlier process (resume); they count as done, not as speed.
        enabled: false on every rank but the first, so that one process speaks.
        stream: the terminal, if it is one; standard error by default.
        emit: receives a line where there is no terminal; this module's logger by default.
        clock: seconds, monotonic; tests bring their own.
    """

    def __init__(
        self,
        total: int | None,
        *,
        unit: str = "items",
        description: str = "",
        every_s: float = 5.0,
        initial: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        emit: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock; nothing is shown before the first `advance`."""
        self.total = total
        self.done = initial
        self._unit = unit
        self._description = description
        self._every_s = every_s
        self._initial = initial
        self._enabled = enabled and not _disabled_by_environment()
        self._emit = emit or (lambda line: _log.info("%s", line))
        self._clock = clock
        self._started = clock()
        self._last_line = self._started
        self._marks: deque[tuple[float, int]] = deque(
            [(self._started, initial)], maxlen=_WINDOW_LINES + 1
        )
        self._values: dict[str, Any] = {}
        self._closed = False
        self._bar = self._open_bar(stream or sys.stderr) if self._enabled else None

    def advance(self, n: int = 1, **values: Any) -> None:
        """Count `n` more units; `values` (a loss, a rate) are shown behind the numbers."""
        self.done += n
        self._values.update(values)
        if self._bar is not None:
            if values:
                self._bar.set_postfix_str(self._shown_values(), refresh=False)
            self._bar.update(n)
        elif self._enabled and self._clock() - self._last_line >= self._every_s:
            self._write_line()

    @property
    def rate(self) -> float:
        """Units per second of this process over the last minute or so; 0 before any time passed."""
        then, done = self._marks[0]
        elapsed = self._clock() - then
        return (self.done - done) / elapsed if elapsed > 0 else 0.0

    def close(self) -> None:
        """Show the final state once; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.close()
        elif self._enabled:
            self._write_final_line()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close, so that a failure still leaves a line that says how far the work came."""
        self.close()

    def _open_bar(self, stream: TextIO) -> Any:
        if not stream.isatty():
            return None
        from tqdm import tqdm

        # tqdm's own rate leaves `initial` out. disable=False: the environment was read already,
        # and tqdm takes any text, "0" and "false" included, for yes.
        return tqdm(
            total=self.total,
            initial=self._initial,
            desc=self._description or None,
            unit=f" {self._unit}",
            unit_scale=(self.total or 0) >= 100_000,
            dynamic_ncols=True,
            file=stream,
            disable=False,
        )

    def _write_line(self) -> None:
        rate = self.rate
        parts = [self._position(), f"{format_quantity(rate)} {self._unit}/s"]
        if self.total is not None and rate > 0:
            parts.append(f"ETA {format_duration(max(self.total - self.done, 0) / rate)}")
        self._emit(self._joined(parts))
        self._last_line = self._clock()
        self._marks.append((self._last_line, self.done))

    def _write_final_line(self) -> None:
        elapsed = self._clock() - self._started
        rate = (self.done - self._initial) / elapsed if elapsed > 0 else 0.0
        parts = [
            f"{self._position()} in {format_duration(elapsed)}",
            f"{format_quantity(rate)} {self._unit}/s",
        ]
        if self._initial:
            parts.append(f"{self._initial} done before")
        self._emit(self._joined(parts))

    def _position(self) -> str:
        if self.total is None:
            return f"{self.done} {self._unit}"
        percent = 100.0 * self.done / self.total if self.total else 100.0
        return f"{self.done}/{self.total} {self._unit} ({percent:.1f} %)"

    def _joined(self, parts: list[str]) -> str:
        shown = self._shown_values()
        line = ", ".join([*parts, shown] if shown else parts)
        return f"{self._description}: {line}" if self._description else line

    def _shown_values(self) -> str:
        return ", ".join(f"{name}={_short(value)}" for name, value in self._values.items())


def format_duration(seconds: float) -> str:
    """Return `m:ss`, `h:mm:ss` or `Nd h:mm:ss`."""
    whole = round(seconds)
    days, rest = divmod(whole, 86_400)
    hours, rest = divmod(rest, 3_600)
    minutes, secs = divmod(rest, 60)
    if days:
        return f"{days}d {hours}:{minutes:02d}:{secs:02d}"
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def format_quantity(value: float) -> str:
    """Return three significant digits with k, M or G: `0.52`, `81.3`, `12.4k`."""
    size = abs(value)
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor * 0.9995:
            return f"{_three_digits(value / factor)}{suffix}"
    return _three_digits(value)


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:.2f}" if size < 9.995 else f"{value:.1f}" if size < 99.95 else f"{value:.0f}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _disabled_by_environment() -> bool:
    return os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false", "no")
