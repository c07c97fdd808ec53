"""When a job's pod loads its teacher: not all nodes at once, where all read one file system."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["NODE", "load_delay_s", "wait_for_turn"]

NODE = "DISTILL_NODE"
"""Variable with the name of the pod's node."""
_MARK = "distill-waited-to-load"
_log = logging.getLogger(__name__)


def load_delay_s(node: str | None, spread_s: float) -> float:
    """Return how many seconds after its start a pod loads its teacher.

    By the node's name, so that pods of one node read together, and the file system is asked once.

    Args:
        node: its name; None: this is no job's pod.
        spread_s: within which the nodes begin, evenly on average.
    """
    if not node:
        return 0.0
    digest = hashlib.sha256(node.encode()).digest()
    return spread_s * int.from_bytes(digest[:4]) / 2**32


def wait_for_turn(
    spread_s: float, *, folder: Path | None = None, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Wait until it is this node's turn to load; once a pod, not after each of its restarts.

    Args:
        spread_s: within which the nodes begin.
        folder: outlives a container and ends with its pod; None: that of temporary files.
        sleep: waits.
    """
    node = os.environ.get(NODE)
    delay_s = load_delay_s(node, spread_s)
    mark = (folder or Path(tempfile.gettempdir())) / _MARK
    if not delay_s or mark.exists():  # the others are through by now
        return
    _log.info("node %s loads its teacher in %.0f s (teacher.load_spread_s)", node, delay_s)
    sleep(delay_s)
    mark.touch()
