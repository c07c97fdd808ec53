"""A profile of a few steps by torch.profiler, as a trace for Perfetto or Chrome."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

__all__ = ["StepProfile"]

_log = logging.getLogger(__name__)


class StepProfile:
    """Records the steps of a window; close it, since a run may end inside."""

    def __init__(self, window: tuple[int, int] | None, folder: Path) -> None:
        """Record nothing yet.

        Args:
            window: first and last step, from 1; None: no profile.
            folder: of the traces; made when there is one.
        """
        self._window = window
        self._folder = folder
        self._profiler: Any = None
        self._steps = (0, 0)

    def before(self, step: int) -> None:
        """Start recording, if the step is in the window."""
        if self._window is None or self._profiler is not None:
            return
        first, last = self._window
        if first <= step <= last:
            kinds = torch.profiler.ProfilerActivity
            cuda = [kinds.CUDA] if torch.cuda.is_available() else []
            self._profiler = torch.profiler.profile(activities=[kinds.CPU, *cuda])
            self._profiler.start()
            self._steps = (step, step - 1)

    def after(self, step: int) -> None:
        """Write the trace, if the step was the last one of the window."""
        if self._profiler is None or self._window is None:
            return
        self._steps = (self._steps[0], step)
        if step >= self._window[1]:
            self.close()

    def close(self) -> None:
        """Write what has been recorded; safe to call twice."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the trace has the end of the last step's kernels
        profiler.stop()
        first, last = self._steps
        if last < first:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"steps-{first}-{last}.json.gz"
        profiler.export_chrome_trace(str(file))
        _log.info("%s: a profile of steps %d to %d; open it at ui.perfetto.dev", file, first, last)
