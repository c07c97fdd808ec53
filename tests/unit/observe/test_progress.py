"""Progress lines by a fake clock: rate, ETA, resume, and silence where silence is asked for."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import pytest

from pipeline.progress import Progress


class _Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    clock = _Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


def _loop(progress: Progress, clock: _Clock, *, steps: int, seconds_each: float) -> None:
    for _ in range(steps):
        clock.now_s += seconds_each
        progress.advance(1, loss=2.34567)


def test_a_line_every_few_seconds_with_rate_and_eta(clock: _Clock) -> None:
    lines = list[str]()
    with Progress(
        100, unit="steps", description="train", every_s=5, emit=lines.append, stream=io.StringIO()
    ) as progress:
        _loop(progress, clock, steps=22, seconds_each=0.5)
    assert lines == [
        "train: 10/100 steps (10.0 %), 2.00 steps/s, ETA 00:45, loss=2.346",
        "train: 20/100 steps (20.0 %), 2.00 steps/s, ETA 00:40, loss=2.346",
        "train: 22/100 steps (22.0 %) in 00:11, 2.00 steps/s, loss=2.346",
    ]


def test_units_done_before_a_resume_count_as_done_but_not_as_speed(clock: _Clock) -> None:
    lines = list[str]()
    progress = Progress(1000, unit="steps", initial=900, emit=lines.append, stream=io.StringIO())
    _loop(progress, clock, steps=5, seconds_each=1.0)
    progress.close()
    progress.close()
    assert lines[0].startswith("905/1000 steps (90.5 %), 1.00 steps/s, ETA 01:35")
    assert lines[1].startswith("905/1000 steps (90.5 %) in 00:05, 1.00 steps/s, 900 done before")
    assert len(lines) == 2


def test_a_total_and_units_done_before_may_be_found_out_on_the_way(clock: _Clock) -> None:
    lines = list[str]()
    progress = Progress(10, unit="steps", emit=lines.append, stream=io.StringIO())
    progress.retarget(1000)
    progress.count_before(900)
    _loop(progress, clock, steps=5, seconds_each=1.0)
    progress.close()
    assert progress.done == 905
    assert lines[0].startswith("905/1000 steps (90.5 %), 1.00 steps/s, ETA 01:35")
    assert lines[1].startswith("905/1000 steps (90.5 %) in 00:05, 1.00 steps/s, 900 done before")
    assert len(lines) == 2


def test_a_silent_one_may_find_out_on_the_way_as_well() -> None:
    with Progress(2, enabled=False) as progress:
        progress.retarget(9)
        progress.count_before(4)
        progress.advance(2)
    assert progress.done == 6


def test_a_slow_start_is_forgotten_by_the_eta(clock: _Clock) -> None:
    lines = list[str]()
    progress = Progress(10_000, unit="steps", emit=lines.append, stream=io.StringIO())
    _loop(progress, clock, steps=1, seconds_each=600.0)
    _loop(progress, clock, steps=1000, seconds_each=0.1)
    rate = float(lines[-1].split(", ")[1].removesuffix(" steps/s"))
    assert 9.5 < rate < 10.5


def test_an_unknown_total_has_no_percentage_and_no_eta(clock: _Clock) -> None:
    lines = list[str]()
    progress = Progress(None, unit="rows", emit=lines.append, stream=io.StringIO())
    _loop(progress, clock, steps=6, seconds_each=1.0)
    assert lines == ["5 rows, 1.00 rows/s, loss=2.346"]


def test_nothing_is_divided_by_zero() -> None:
    lines = list[str]()
    with Progress(0, emit=lines.append, stream=io.StringIO()):
        pass
    assert lines == ["0/0 items (100.0 %) in 00:00, 0.00 items/s"]


def test_a_total_that_is_known_late_and_no_summary(clock: _Clock) -> None:
    """As the cache's commands show rows: what is short leaves no line in a log."""
    for seconds, expected in (
        (4.0, ["verify: 30/40 rows (75.0 %), 2.50 rows/s"]),
        (0.1, []),
    ):
        lines = list[str]()
        with Progress(
            unit="rows", description="verify", every_s=10, summary=False, emit=lines.append,
            stream=io.StringIO(),
        ) as progress:  # fmt: skip
            progress.start(40)
            for _ in range(4):
                clock.now_s += seconds
                progress.advance(10)
        assert [line.partition(", ETA")[0] for line in lines] == expected


@pytest.mark.parametrize("value", ["1", "true"])
def test_tqdm_disable_silences_lines_and_bar(
    monkeypatch: pytest.MonkeyPatch, value: str, clock: _Clock
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", value)
    lines, terminal = list[str](), _Terminal()
    for stream in (io.StringIO(), terminal):
        with Progress(9, emit=lines.append, stream=stream) as progress:
            _loop(progress, clock, steps=9, seconds_each=9.0)
            assert progress.done == 9
    assert (lines, terminal.getvalue()) == ([], "")


def test_other_ranks_are_silent() -> None:
    lines = list[str]()
    with Progress(2, enabled=False, emit=lines.append, stream=_Terminal()) as progress:
        progress.advance(2)
    assert not lines


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "0")
    terminal, lines = _Terminal(), list[str]()
    with Progress(4, unit="steps", initial=2, emit=lines.append, stream=terminal) as progress:
        progress.advance(2, loss=1.5)
    assert "4/4" in terminal.getvalue()
    assert "loss=1.5" in terminal.getvalue()
    assert not lines


def test_no_thread_is_started(clock: _Clock) -> None:
    """A process that forks later must not hold tqdm's monitor."""
    before = set(threading.enumerate())
    with Progress(4, emit=lambda _: None, stream=io.StringIO()) as progress:
        progress.advance(1)
        assert set(threading.enumerate()) <= before


def test_the_numbers_go_to_a_file_of_whoever_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a worker beside others (`stages/workers.py`): no bar and no lines of its own."""
    file, lines = tmp_path / "numbers.json", list[str]()
    monkeypatch.setenv("DISTILL_PROGRESS_FILE", str(file))
    with Progress(
        10, unit="tokens", description="cache-teacher", every_s=0, emit=lines.append
    ) as progress:
        progress.count_before(2)
        progress.advance(3)
        progress.retarget(20)
    assert json.loads(file.read_text()) == {
        "description": "cache-teacher", "unit": "tokens", "done": 5, "initial": 2, "total": 20,
    }  # fmt: skip
    assert lines == []
