"""Threads that read the shards of the next steps while those of this one are decoded."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

__all__ = ["ReadAhead"]

_log = logging.getLogger(__name__)


class ReadAhead:
    """Opens shards in the order they are wanted in; errors are left to who reads the shard."""

    def __init__(self, open_shard: Callable[[int], None], *, threads: int) -> None:
        """Start the threads.

        Daemon threads, not an executor's: the interpreter joins those when it ends, and a store
        that hangs would keep the process alive indefinitely.

        Args:
            open_shard: reads one shard, or returns at once where it is at hand.
            threads: 0 reads nothing ahead.
        """
        self._open_shard = open_shard
        self._wanted: deque[int] = deque()
        self._newest: list[int] = []
        self._changed = threading.Condition()
        self._closed = False
        for number in range(threads):
            threading.Thread(target=self._work, name=f"data-read-{number}", daemon=True).start()

    def want(self, shards: Sequence[int]) -> None:
        """Read these shards, in this order, in place of those wanted before."""
        if shards == self._newest:
            return
        with self._changed:
            self._newest = list(shards)
            self._wanted = deque(shards)
            self._changed.notify_all()

    def close(self) -> None:
        """Let the threads end after the shards in their hands; does not wait for them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._wanted)
                if self._closed:
                    return
                shard = self._wanted.popleft()
            try:
                self._open_shard(shard)
            except Exception as error:
                _log.debug("shard %d could not be read ahead: %s", shard, error)
