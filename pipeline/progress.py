"""Progress of a long loop, by tqdm: its bar on a terminal, a line every few seconds elsewhere.

Of a process that another one shows together with its like, the numbers go to a file instead.

Here and not in `observe`: the cache's own commands, a layer below that, show progress too.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

__all__ = ["PROGRESS_FILE", "Progress"]

PROGRESS_FILE = "DISTILL_PROGRESS_FILE"
"""Variable that names the file, JSON: `description`, `unit`, `done`, `initial`, `total`."""
_REWRITTEN_EVERY_S = 0.5

_log = logging.getLogger(__name__)


class Progress:
    """Counts `done` towards a total and shows it; a context manager.

    Args:
        total: how many units the work has, those done before included; none if unknown.
        unit: what is counted, in the plural ("steps", "sequences").
        description: a word in front of the numbers.
        every_s: seconds between lines where there is no terminal.
        initial: units done by an earlier process (resume); they count as done, not as speed.
        enabled: false on every rank but the first, so that one process shows it.
        summary: whether the last line says how long all took, where there is no terminal.
        stream: the terminal, if it is one; standard error by default.
        emit: receives a line where there is no terminal; this module's logger by default.
    """

    def __init__(
        self,
        total: int | None = None,
        *,
        unit: str = "items",
        description: str = "",
        every_s: float = 5.0,
        initial: int = 0,
        enabled: bool = True,
        summary: bool = True,
        stream: TextIO | None = None,
        emit: Callable[[str], None] | None = None,
    ) -> None:
        """Start the clock; a log gets nothing before the first `advance`."""
        self.done = initial
        self._unit = unit
        self._description = description
        self._summary = summary
        self._emit = emit or (lambda line: _log.info("%s", line))
        self._values: dict[str, Any] = {}
        self._closed = False
        self._initial = initial
        self._file = os.environ.get(PROGRESS_FILE) if enabled else None
        self._written = 0.0
        stream = stream or sys.stderr
        terminal = stream.isatty()
        self._bar = _bar_class(None if terminal else self._show_line)(
            total=total,
            initial=initial,
            desc=description or None,
            unit=f" {unit}",
            unit_scale=(total or 0) >= 100_000,
            dynamic_ncols=terminal,
            file=stream if terminal else io.StringIO(),
            mininterval=0.1 if terminal else every_s,
            miniters=None if terminal else 0,
            # Read here: tqdm takes any text in the environment, "0" and "false" included, for yes.
            disable=not enabled or _disabled_by_environment() or self._file is not None,
        )
        self._total = total

    def start(self, total: int) -> None:
        """Begin to count from 0 towards `total`, for work whose size is found out late."""
        self.done = self._initial = 0
        self._total = total
        self._bar.reset(total=total)

    def retarget(self, total: int) -> None:
        """Count towards another total, for work whose size is found out on the way."""
        self._bar.total = self._total = total
        self._tell()

    def count_before(self, n: int) -> None:
        """Count units that an earlier process has done, found out on the way."""
        self.done += n
        self._initial += n
        if not self._bar.disable:  # a disabled bar of tqdm lacks these numbers
            self._bar.n += n
            self._bar.initial += n
            self._bar.last_print_n += n  # else they would count as speed

    def advance(self, n: int = 1, **values: Any) -> None:
        """Count `n` more units; `values` (a loss, a rate) are shown behind the numbers."""
        self.done += n
        if values:
            self._values.update(values)
            shown = ", ".join(f"{name}={_short(value)}" for name, value in self._values.items())
            self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(n)
        self._tell()

    def close(self) -> None:
        """Show the final state once; safe to call twice."""
        if not self._closed:
            self._closed = True
            self._bar.close()
            self._tell(now=True)

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

    def _tell(self, *, now: bool = False) -> None:
        """Write the numbers to the file of whoever shows them, not at every call."""
        moment = time.monotonic()
        if self._file is None or (not now and moment - self._written < _REWRITTEN_EVERY_S):
            return
        self._written = moment
        numbers = {
            "description": self._description, "unit": self._unit, "done": self.done,
            "initial": self._initial, "total": self._total,
        }  # fmt: skip
        with contextlib.suppress(OSError):  # nobody looks any more
            with open(f"{self._file}.new", "w", encoding="utf-8") as file:
                json.dump(numbers, file)
            os.replace(f"{self._file}.new", self._file)

    def _show_line(self, state: dict[str, Any]) -> None:
        """Emit tqdm's numbers as one line of a log."""
        if self._closed and not self._summary:
            return
        n, total, initial, elapsed = (state[k] for k in ("n", "total", "initial", "elapsed"))
        if n == initial and not self._closed:
            return
        from tqdm import tqdm

        # None at the end: then the mean over all.
        rate = state["rate"] or ((n - initial) / elapsed if elapsed > 0 else 0.0)
        line = f"{n} {self._unit}"
        if total is not None:
            line = f"{n}/{total} {self._unit} ({100.0 * n / total if total else 100.0:.1f} %)"
        if self._closed:
            line += f" in {tqdm.format_interval(elapsed)}"
        line += f", {tqdm.format_sizeof(rate)} {self._unit}/s"
        if self._closed and initial:
            line += f", {initial} done before"
        if not self._closed and total is not None and rate > 0:
            line += f", ETA {tqdm.format_interval(max(total - n, 0) / rate)}"
        if state["postfix"]:
            line += f", {state['postfix']}"
        self._emit(f"{self._description}: {line}" if self._description else line)


def _bar_class(show: Callable[[dict[str, Any]], None] | None) -> Any:
    """Return tqdm without its thread; with `show`, its display goes there instead."""
    from tqdm import tqdm

    def display(bar: Any, msg: str | None = None, pos: int | None = None) -> None:
        assert show is not None
        show(bar.format_dict)

    own: dict[str, Any] = {"monitor_interval": 0}
    return type("Bar", (tqdm,), own if show is None else {**own, "display": display})


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _disabled_by_environment() -> bool:
    return os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false", "no")
