"""The sparsifier's time: by the clock on a CPU, by events that have passed on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from pipeline.observe.shares import Shares
from pipeline.teacher.sparsify.stopwatch import Stopwatch


def test_a_cpu_is_timed_by_the_clock() -> None:
    watch = Stopwatch()
    started = time.perf_counter()
    for _ in range(3):
        with watch.running(torch.device("cpu")):
            time.sleep(0.02)
        time.sleep(0.02)
    assert 0.06 <= watch.seconds() <= time.perf_counter() - started - 0.06


def test_it_is_taken_out_of_the_teachers_time() -> None:
    watch, shares = Stopwatch(), Shares()
    shares.inside("teacher", "sparsifier", watch.seconds)
    with shares.spent("teacher"):
        time.sleep(0.02)
        with watch.running(torch.device("cpu")):
            time.sleep(0.03)
    seconds = shares.summary().seconds
    assert seconds["sparsifier"] == watch.seconds() >= 0.03
    assert 0.02 <= seconds["teacher"] <= shares.summary().wall_s - watch.seconds()


class _Event:
    """A CUDA event as far as the watch uses one; a stream is a list of those recorded."""

    passed: Callable[[_Event], bool]

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: list[_Event]) -> None:
        stream.append(self)
        self.place = len(stream)

    def query(self) -> bool:
        return self.passed()

    def elapsed_time(self, end: _Event) -> float:
        assert self.query()
        assert end.query()
        return 250.0


def test_events_count_once_the_device_has_passed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls; what CUDA does with them is tested on no machine without one."""
    stream: list[_Event] = []
    reached = 0
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(_Event, "passed", lambda event: event.place <= reached, raising=False)
    watch = Stopwatch()
    for _ in range(3):
        with watch.running(torch.device("cuda:0")):
            pass
    assert watch.seconds() == 0
    reached = 5  # two whole pairs, and the start of the third
    assert watch.seconds() == watch.seconds() == 0.5
    reached = 6
    assert watch.seconds() == 0.75
