"""Progress in rows: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

__all__ = ["RowsBar"]

_EVERY_S = 10.0


class RowsBar:
    """Counts rows and shows them on `stream`; a context manager.

    Without a terminal, a pass shorter than `every_s` prints nothing.
    """

    def __init__(
        self,
        description: str,
        *,
        every_s: float = _EVERY_S,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the bar; `start` sets the number of rows."""
        from tqdm import tqdm

        self._description = description
        self._every_s = every_s
        self._stream = stream or sys.stderr
        self._clock = clock
        self._total = self._done = 0
        self._last = clock()
        # disable=None: tqdm shows itself on terminals only.
        self._bar = tqdm(unit="rows", desc=description, file=self._stream, disable=None)

    def start(self, rows: int) -> None:
        """Set the number of rows of the next pass."""
        self._total, self._done = rows, 0
        self._bar.reset(total=rows)

    def advance(self, rows: int) -> None:
        """Count rows that are done."""
        self._done += rows
        self._bar.update(rows)
        if self._stream.isatty() or self._clock() - self._last < self._every_s:
            return
        self._last = self._clock()
        percent = 100.0 * self._done / max(self._total, 1)
        line = f"{self._description}: {self._done}/{self._total} rows ({percent:.1f} %)\n"
        self._stream.write(line)
        self._stream.flush()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the bar."""
        self._bar.close()
