"""Time by part: innermost only, per thread, live; counts and rates; the last line of a run."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.observe.shares import Shares, Summary, summary_line


class _Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def shares(clock: _Clock) -> Shares:
    return Shares(clock=clock)


def test_time_goes_to_the_innermost_part(shares: Shares, clock: _Clock) -> None:
    with shares.spent("leases"):
        clock.now_s += 1
        with shares.spent("teacher"):
            clock.now_s += 6
            with shares.spent("leases"):
                clock.now_s += 0.5
            clock.now_s += 2
        clock.now_s += 0.5
    clock.now_s += 10
    summary = shares.summary()
    assert summary.seconds == {"leases": 2.0, "teacher": 8.0}
    assert summary.wall_s == 20
    assert summary.share("teacher") == 0.4
    assert summary.share("never") == 0


def test_a_part_that_is_still_open_counts_up_to_now(shares: Shares, clock: _Clock) -> None:
    with shares.spent("teacher"):
        clock.now_s += 4
        assert shares.summary().seconds == {"teacher": 4.0}
        assert shares.summary().seconds == {"teacher": 4.0}  # asking changes nothing
        with shares.spent("waiting"):
            clock.now_s += 1
            assert shares.summary().seconds == {"teacher": 4.0, "waiting": 1.0}
    assert shares.summary().seconds == {"teacher": 4.0, "waiting": 1.0}


def test_an_error_inside_closes_its_part(shares: Shares, clock: _Clock) -> None:
    def fail() -> None:
        with shares.spent("leases"), shares.spent("teacher"):
            clock.now_s += 3
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now_s += 5
    assert shares.summary().seconds == {"leases": 0.0, "teacher": 3.0}


def test_threads_have_parts_of_their_own(shares: Shares, clock: _Clock) -> None:
    inside, leave = threading.Event(), threading.Event()

    def write() -> None:
        with shares.spent("encoding"):
            inside.set()
            leave.wait(10)

    with shares.spent("teacher"):
        thread = threading.Thread(target=write)
        thread.start()
        assert inside.wait(10)
        clock.now_s += 7
        leave.set()
        thread.join(10)
        clock.now_s += 1
    summary = shares.summary()
    assert summary.seconds == {"encoding": 7.0, "teacher": 8.0}
    assert sum(map(summary.share, summary.seconds)) > 1  # side by side


def test_nothing_is_lost_between_many_threads() -> None:
    shares = Shares()

    def work() -> None:
        for _ in range(500):
            with shares.spent("store"):
                shares.add(bytes=3, shards=1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    summary = shares.summary()
    assert summary.counts == {"bytes": 12_000, "shards": 4_000}
    assert 0 < summary.seconds["store"] <= 8 * summary.wall_s


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["open a", "open b", "close"]), st.integers(0, 9)), max_size=40
    )
)
@settings(max_examples=100, deadline=None)
def test_parts_add_up_to_the_time_in_which_any_was_open(steps: list[tuple[str, int]]) -> None:
    clock = _Clock()
    shares = Shares(clock=clock)
    opened: list[object] = []
    expected: dict[str, float] = {}
    names: list[str] = []
    for what, seconds in steps:
        if what == "close":
            if opened:
                opened.pop().__exit__(None, None, None)  # type: ignore[attr-defined]
                names.pop()
        else:
            part = shares.spent(what[-1])
            part.__enter__()
            opened.append(part)
            names.append(what[-1])
        clock.now_s += seconds
        if names:
            expected[names[-1]] = expected.get(names[-1], 0.0) + seconds
        found = shares.summary().seconds
        assert {name: spent for name, spent in found.items() if spent} == {
            name: spent for name, spent in expected.items() if spent
        }


def test_a_counter_inside_a_part_is_taken_out_of_it(shares: Shares, clock: _Clock) -> None:
    spent = [100.0]  # by an earlier run in this process
    shares.inside("teacher", "sparsifier", lambda: spent[0])
    assert shares.summary().seconds == {"teacher": 0.0, "sparsifier": 0.0}
    with shares.spent("teacher"):
        clock.now_s += 10
        spent[0] += 1.5
        assert shares.summary().seconds == {"teacher": 8.5, "sparsifier": 1.5}
    spent[0] += 20  # more than there was: never a negative share
    assert shares.summary().seconds == {"teacher": 0.0, "sparsifier": 10.0}


def test_rates_look_back_over_the_window(shares: Shares, clock: _Clock) -> None:
    assert shares.summary().rates == {}
    for _ in range(300):
        clock.now_s += 1
        shares.add(tokens=10)
    assert shares.summary().rates["tokens"] == pytest.approx(10, rel=0.02)
    for _ in range(120):
        clock.now_s += 1
        shares.add(tokens=50)
    assert shares.summary().rates["tokens"] == pytest.approx(50, rel=0.02)
    clock.now_s += 30
    assert shares.summary().rates["tokens"] == pytest.approx(25, rel=0.05)
    clock.now_s += 1000
    assert shares.summary().rates["tokens"] == 0
    shares.add(tokens=600)
    clock.now_s += 0.5
    assert shares.summary().rates["tokens"] == pytest.approx(10)  # of the window, not of the pause
    clock.now_s += 500
    shares.add(tokens=60)
    clock.now_s += 0.5
    assert shares.summary().rates["tokens"] == pytest.approx(1)  # the burst before it is forgotten
    assert shares.summary().counts == {"tokens": 9_660}


def test_a_first_rate_is_of_the_time_there_was(shares: Shares, clock: _Clock) -> None:
    clock.now_s += 4
    shares.add(tokens=100)
    assert shares.summary().rates["tokens"] == 25


def test_the_window_does_not_grow(shares: Shares, clock: _Clock) -> None:
    for _ in range(10_000):
        clock.now_s += 0.7
        shares.add(tokens=1)
    assert len(shares._marks) <= 125


def test_a_summary_is_frozen(shares: Shares) -> None:
    summary = shares.summary()
    with pytest.raises(TypeError):
        summary.seconds["teacher"] = 1.0  # type: ignore[index]
    shares.add(tokens=1)
    assert summary.counts == {}


def test_the_line_at_the_end() -> None:
    seconds = {
        "waiting": 1.476, "teacher": 671.6, "encoding": 14.8, "sparsifier": 36.9, "store": 7.4,
    }  # fmt: skip
    counts = {"tokens": 1_234_567, "shards": 2}
    summary = Summary(738.0, seconds, counts, {"tokens": 1.0}, {})
    assert summary_line(summary) == (
        "1,234,567 tokens in 12.3 min (1,673 tokens/s): teacher 91 %, sparsifier 5 %, "
        "encoding 2 %, store 1 %, waiting for the writer 0.2 %"
    )


@pytest.mark.parametrize(
    ("wall_s", "seconds", "line"),
    [
        (0.0, {}, "0 tokens in 0.0 s (0 tokens/s)"),
        (10.0, {"leases": 0.0}, "0 tokens in 10.0 s (0 tokens/s): leases 0 %"),
        (7200.0, {"other": 7200.0, "loading": 72.0},
         "0 tokens in 2.0 h (0 tokens/s): loading the teacher 1 %, other 100 %"),
    ],
)  # fmt: skip
def test_odd_lines(wall_s: float, seconds: dict[str, float], line: str) -> None:
    assert summary_line(Summary(wall_s, seconds, {}, {}, {})) == line
