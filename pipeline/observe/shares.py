"""Where a worker's time goes, by name, and how much it gets done; safe from all its threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["PARTS", "Shares", "Summary", "summary_line"]

PARTS: Mapping[str, str] = MappingProxyType(
    {
        "preparing": "corpus and plan",
        "loading": "loading the teacher",
        "teacher": "teacher",
        "sparsifier": "sparsifier",
        "encoding": "encoding",
        "store": "store",
        "waiting": "waiting for the writer",
        "leases": "leases",
    }
)
"""The parts of stage one and what a summary calls them. `store` is the writer's time in reading and
writing the cache; `waiting` is the engine's, while the writer is not done with the shard before."""

_MARKS = 60
"""Points at which a window remembers the counts; its edge is exact to a 60th."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The account at one moment."""

    wall_s: float
    """Since the account was opened."""
    seconds: Mapping[str, float]
    """By part. Parts of different threads overlap, so their sum may exceed `wall_s`."""
    counts: Mapping[str, int]
    """`tokens`, `loss_mask`, `shards`, `bytes`, ... done by this worker."""
    rates: Mapping[str, float]
    """Of each count, per second over the last minute."""
    levels: Mapping[str, float]
    """Numbers that are set, not counted: planned tokens, ..."""

    def share(self, part: str) -> float:
        """Return a part's share of wall time, from 0 to 1 for each thread that spends it."""
        return self.seconds.get(part, 0.0) / self.wall_s if self.wall_s > 0 else 0.0


class Shares:
    """The account. Time is charged to the innermost part of each thread, so nothing counts twice.

    Args:
        window_s: what rates look back over.
        clock: seconds, monotonic; tests bring their own.
    """

    def __init__(
        self, *, window_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Open the account; wall time runs from here."""
        self._clock = clock
        self._window_s = window_s
        self._opened = clock()
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._stacks: dict[int, list[str]] = {}
        self._since: dict[int, float] = {}
        """When the innermost part of each thread was last charged."""
        self._inside: dict[str, tuple[str, Callable[[], float]]] = {}
        self._counts: dict[str, int] = {}
        self._marks: deque[tuple[float, dict[str, int]]] = deque([(self._opened, {})])
        """Moments and the counts that stood then, oldest first."""
        self._added = self._opened
        self._levels: dict[str, float] = {}

    @contextmanager
    def spent(self, part: str) -> Iterator[None]:
        """Charge what happens inside to `part`, except where another `spent` is open inside it."""
        thread = threading.get_ident()
        with self._lock:
            self._charge(thread)
            self._stacks.setdefault(thread, []).append(part)
            self._seconds.setdefault(part, 0.0)
        try:
            yield
        finally:
            with self._lock:
                self._charge(thread)
                self._stacks[thread].pop()
                if not self._stacks[thread]:
                    del self._stacks[thread], self._since[thread]

    def inside(self, outer: str, part: str, seconds: Callable[[], float]) -> None:
        """Take `part` out of `outer` by a counter that code within `outer` keeps itself.

        For what runs where no `spent` can be put around it, such as the sparsifier within one call
        of the engine.

        Args:
            outer: the part that holds it.
            part: the name to charge.
            seconds: returns all seconds so far; never falls. What it has counted before now is
                left out. Asked at every summary, from any thread.
        """
        before = seconds()
        with self._lock:
            self._inside[part] = (outer, lambda: seconds() - before)

    def add(self, **counts: int) -> None:
        """Count what was done: `add(tokens=512, shards=1)`."""
        with self._lock:
            now = self._clock()
            self._mark(now)
            self._added = now
            for name, count in counts.items():
                self._counts[name] = self._counts.get(name, 0) + count

    def level(self, **values: float) -> None:
        """Set numbers that go up and down: `level(planned_shards=128)`."""
        with self._lock:
            self._levels.update(values)

    def summary(self) -> Summary:
        """Return the account up to now, parts that are still open included."""
        with self._lock:
            now = self._clock()
            seconds = dict(self._seconds)
            for thread, stack in self._stacks.items():
                seconds[stack[-1]] += max(now - self._since[thread], 0.0)
            inside = dict(self._inside)
            counts, levels = dict(self._counts), dict(self._levels)
            self._mark(now)
            began, before = self._marks[0]
        for part, (outer, spent) in inside.items():
            # A counter that is read late may run ahead of the span that holds it.
            taken = min(max(spent(), 0.0), seconds.get(outer, 0.0))
            seconds[part] = seconds.get(part, 0.0) + taken
            seconds[outer] = seconds.get(outer, 0.0) - taken
        elapsed = min(now - began, self._window_s)
        rates = {
            name: (count - before.get(name, 0)) / elapsed if elapsed > 0 else 0.0
            for name, count in counts.items()
        }
        return Summary(
            wall_s=now - self._opened,
            seconds=MappingProxyType(seconds),
            counts=MappingProxyType(counts),
            rates=MappingProxyType(rates),
            levels=MappingProxyType(levels),
        )

    def _charge(self, thread: int) -> None:
        """Give the time since the last change to the thread's innermost part."""
        now = self._clock()
        stack = self._stacks.get(thread)
        if stack:
            self._seconds[stack[-1]] += max(now - self._since[thread], 0.0)
        self._since[thread] = now

    def _mark(self, now: float) -> None:
        """Remember the counts, now and since the last addition; drop what the window has left."""
        step = self._window_s / _MARKS
        if now - self._added >= step and self._counts != self._marks[-1][1]:
            self._marks.append((self._added, dict(self._counts)))
        if now - self._marks[-1][0] >= step:
            self._marks.append((now, dict(self._counts)))
        while len(self._marks) > 1 and self._marks[1][0] <= now - self._window_s:
            self._marks.popleft()


def summary_line(summary: Summary) -> str:
    """Return one line for the end of a run: tokens, time, speed, and where the time went."""
    tokens = summary.counts.get("tokens", 0)
    rate = tokens / summary.wall_s if summary.wall_s > 0 else 0.0
    names = [*PARTS, *sorted(set(summary.seconds) - set(PARTS))]
    parts = [
        f"{PARTS.get(name, name)} {_percent(summary.share(name))}"
        for name in names
        if name in summary.seconds
    ]
    head = f"{tokens:,} tokens in {_duration(summary.wall_s)} ({rate:,.0f} tokens/s)"
    return f"{head}: {', '.join(parts)}" if parts else head


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 0.95 or not percent else f"{percent:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
