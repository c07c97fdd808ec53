"""A generator of which every call is watched: one that is stuck ends its process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.teacher.fleet.pulse import Pulse
from pipeline.teacher.generation.base import Generator, WriteRequest, Written

__all__ = ["WatchedGenerator"]


class WatchedGenerator:
    """Calls another generator; each step of it counts as a sign of life."""

    def __init__(self, generator: Generator, pulse: Pulse) -> None:
        """Keep both."""
        self._generator = generator
        self._pulse = pulse

    def write(
        self,
        requests: Sequence[WriteRequest],
        *,
        on_responses: Callable[[int], None] | None = None,
    ) -> list[Written]:
        """Return the response to each request, in order."""

        def count(responses: int) -> None:
            self._pulse.advance()
            if on_responses is not None and responses:
                on_responses(responses)

        with self._pulse.expecting():
            return self._generator.write(requests, on_responses=count)

    def close(self) -> None:
        """Free the device."""
        self._generator.close()
