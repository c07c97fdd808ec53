"""Progress lines by a fake clock: rate, ETA, resume, and silence where silence is asked for."""

from __future__ import annotations

import io

import pytest

from pipeline.observe.progress import Progress, format_duration, format_quantity


class _Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


def _loop(progress: Progress, clock: _Clock, *, steps: int, seconds_each: float) -> None:
    for _ in range(steps):
        clock.now_s += seconds_each
        progress.advance(1, loss=2.34567)


def test_a_line_every_few_seconds_with_rate_and_eta() -> None:
    clock, lines = _Clock(), list[str]()
    with Progress(
        100, unit="steps", description="train", every_s=5, emit=lines.append, clock=clock,
        stream=io.StringIO(),
    ) as progress:  # fmt: skip
        _loop(progress, clock, steps=22, seconds_each=0.5)
    assert lines == [
        "train: 10/100 steps (10.0 %), 2.00 steps/s, ETA 0:45, loss=2.346",
        "train: 20/100 steps (20.0 %), 2.00 steps/s, ETA 0:40, loss=2.346",
        "train: 22/100 steps (22.0 %) in 0:11, 2.00 steps/s, loss=2.346",
    ]


def test_units_done_before_a_resume_count_as_done_but_not_as_speed() -> None:
    clock, lines = _Clock(), list[str]()
    progress = Progress(
        1000, unit="steps", initial=900, emit=lines.append, clock=clock, stream=io.StringIO()
    )
    _loop(progress, clock, steps=5, seconds_each=1.0)
    progress.close()
    progress.close()
    assert lines[0].startswith("905/1000 steps (90.5 %), 1.00 steps/s, ETA 1:35")
    assert lines[1].startswith("905/1000 steps (90.5 %) in 0:05, 1.00 steps/s, 900 done before")
    assert len(lines) == 2


def test_a_slow_start_is_forgotten_by_the_eta() -> None:
    clock = _Clock()
    progress = Progress(
        10_000, unit="steps", emit=lambda _: None, clock=clock, stream=io.StringIO()
    )
    _loop(progress, clock, steps=1, seconds_each=600.0)
    _loop(progress, clock, steps=1000, seconds_each=0.1)
    assert progress.rate == pytest.approx(10.0)


def test_an_unknown_total_has_no_percentage_and_no_eta() -> None:
    clock, lines = _Clock(), list[str]()
    progress = Progress(None, unit="rows", emit=lines.append, clock=clock, stream=io.StringIO())
    _loop(progress, clock, steps=6, seconds_each=1.0)
    assert lines == ["5 rows, 1.00 rows/s, loss=2.346"]


def test_nothing_is_divided_by_zero() -> None:
    lines = list[str]()
    with Progress(0, emit=lines.append, clock=_Clock(), stream=io.StringIO()) as progress:
        assert progress.rate == 0.0
    assert lines == ["0/0 items (100.0 %) in 0:00, 0.00 items/s"]


@pytest.mark.parametrize("value", ["1", "true"])
def test_tqdm_disable_silences_lines_and_bar(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TQDM_DISABLE", value)
    clock, lines, terminal = _Clock(), list[str](), _Terminal()
    for stream in (io.StringIO(), terminal):
        with Progress(9, emit=lines.append, clock=clock, stream=stream) as progress:
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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01"), (90_061, "1d 1:01:01")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5234, "0.52"), (9.996, "10.0"), (99.96, "100"), (999.9, "1.00k"), (12_441, "12.4k"),
     (3.2e6, "3.20M"), (4e9, "4.00G")],
)  # fmt: skip
def test_quantities(value: float, text: str) -> None:
    assert format_quantity(value) == text
