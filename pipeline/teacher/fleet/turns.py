"""When a worker of a job loads its teacher: one after the other, where all read one file system."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["LONGEST_WAIT_S", "load_delay_s", "wait_for_turn"]

LONGEST_WAIT_S = 1800.0
"""However many workers there are."""
_MARK = "distill-waited-to-load"
_log = logging.getLogger(__name__)


def load_delay_s(replica: str | None, spacing_s: float) -> float:
    """Return how many seconds after its start a worker loads its teacher.

    Args:
        replica: the worker's index in its job; None: it is no job's.
        spacing_s: seconds between two workers.
    """
    return min(int(replica) * spacing_s, LONGEST_WAIT_S) if replica else 0.0


def wait_for_turn(
    spacing_s: float,
    *,
    replica: str | None = None,
    folder: Path | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until it is this worker's turn to load; once a pod, not after each of its restarts.

    Args:
        spacing_s: seconds between two workers.
        replica: the worker's index in its job; None: the environment's.
        folder: outlives a container and ends with its pod; None: that of temporary files.
        sleep: waits.
    """
    replica = replica or os.environ.get("DISTILL_REPLICA_INDEX")
    delay_s = load_delay_s(replica, spacing_s)
    if not delay_s:
        return
    mark = (folder or Path(tempfile.gettempdir())) / _MARK
    if mark.exists():  # the others are through by now
        return
    _log.info("worker %s loads its teacher in %.0f s (teacher.load_spacing_s)", replica, delay_s)
    sleep(delay_s)
    mark.touch()
