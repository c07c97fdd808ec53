"""The steps of a stream on a device, the next one sent while the one before it is computed."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace

from pipeline.data.stream.train_stream import StepBatch
from pipeline.data.transfer import Sent, Transfer

__all__ = ["StepFeed"]


class StepFeed:
    """An iterator of steps whose batches are on the device; `close` it, as the stream's own."""

    def __init__(
        self,
        steps: Generator[StepBatch, None, None],
        transfer: Transfer,
        *,
        ready: Callable[[], bool],
    ) -> None:
        """Read nothing yet.

        Args:
            steps: of the stream.
            transfer: to the device.
            ready: whether the next step is there without waiting; asked by `look_ahead` only.
        """
        self._steps = steps
        self._transfer = transfer
        self._ready = ready
        self._ahead: tuple[StepBatch, list[Sent]] | None = None
        self._error: Exception | None = None

    def look_ahead(self) -> None:
        """Send the next step, if it can be had at once.

        Call it when a step's work has been given to the device, and before its values are read. It
        never waits for data, and what goes wrong is raised where the step is asked for: the step
        before it is still logged and saved.
        """
        if not self._transfer.is_ahead or self._ahead or self._error or not self._ready():
            return
        try:
            self._ahead = self._next()
        except Exception as error:
            self._error = error

    def __iter__(self) -> StepFeed:
        """Return itself."""
        return self

    def __next__(self) -> StepBatch:
        """Return the next step; its copies may be under way, and the compute waits for them."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        step, sent = self._ahead or self._next()
        self._ahead = None
        return replace(step, micro_batches=[self._transfer.receive(part) for part in sent])

    def close(self) -> None:
        """Stop the stream."""
        self._steps.close()

    def _next(self) -> tuple[StepBatch, list[Sent]]:
        step = next(self._steps)
        return step, [self._transfer.send(batch) for batch in step.micro_batches]
