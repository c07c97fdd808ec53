"""One thread that works behind the main one, and never keeps a stopping process alive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

__all__ = ["Behind"]


class Behind:
    """Runs one call at a time on a daemon thread.

    Not an executor: the interpreter joins an executor's threads when it exits, and a thread that
    waits for a store that hangs would keep the process past Kubernetes' grace.
    """

    def __init__(self, name: str) -> None:
        """Start nothing yet."""
        self._name = name
        self._pending: Future[None] | None = None
        self._thread: threading.Thread | None = None

    def start(self, call: Callable[[], None]) -> None:
        """Run `call`; the one before must have been waited for."""
        assert self._pending is None
        future: Future[None] = Future()

        def run() -> None:
            try:
                call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        self._pending = future
        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether there is a call that has not been waited for."""
        return self._pending is not None

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the call; raises what it raised, or TimeoutError while it still runs."""
        if self._pending is not None:
            self._pending.exception(timeout)
            pending, self._pending = self._pending, None
            pending.result()
