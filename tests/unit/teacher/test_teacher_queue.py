"""Which piece of work a worker takes: order, waiting for others, waiting for more to be known."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.observe.shares import Shares
from pipeline.storage import Store
from pipeline.teacher.fleet import queue
from pipeline.teacher.fleet.leases import LEASES, LeaseBoard
from pipeline.teacher.fleet.queue import leased_work

WINDOW = 16
"""Free pieces that a worker considers in order where nobody holds any."""


@dataclass(frozen=True)
class Piece:
    """Done when its file is there."""

    number: int

    @property
    def name(self) -> str:
        return f"piece-{self.number:03d}"

    def is_done(self, store: Store) -> bool:
        return store.exists(self.name)


@dataclass
class Pool:
    """Pieces of which more may become known."""

    store: Store
    known: int
    is_complete: bool = True
    looks: list[bool] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.known

    def missing(self, *, look: bool = True) -> list[Piece]:
        self.looks.append(look)
        return [p for p in map(Piece, range(self.known)) if not p.is_done(self.store)]


@dataclass
class Worker:
    """Does what it gets, and remembers it."""

    pool: Pool
    name: str = "one"
    taken: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    """Of each piece, among those that nobody had when it was taken."""

    def run(self, **options: Any) -> None:
        store = self.pool.store
        board = LeaseBoard(store, self.name, 10.0)
        for work, lease in leased_work(self.pool, board, shares=Shares(), **options):
            held = board.attempts()
            free = [p.number for p in self.pool.missing() if p == work or p.name not in held]
            self.ranks.append(free.index(work.number))
            self.taken.append(work.number)
            store.write(work.name, b"done")
            board.done(lease)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def test_in_order_takes_one_of_the_first(store: Store) -> None:
    worker = Worker(Pool(store, 100))
    worker.run(in_order=True, ahead=WINDOW)
    assert sorted(worker.taken) == list(range(100))
    assert max(worker.ranks) < WINDOW
    assert max(worker.ranks) > 0, "two workers would always meet"


def test_more_is_looked_for_only_when_few_are_free(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "_LISTING_GOOD_FOR", 0)  # the worker lists after every piece
    pool, board = Pool(store, 100), LeaseBoard(store, "one", 10.0)
    for work, lease in leased_work(pool, board, shares=Shares()):
        store.write(work.name, b"done")
        board.done(lease)
    assert pool.looks[0]
    assert pool.looks.count(False) >= 3
    assert pool.looks[-1]


def test_without_an_order_any_may_come(store: Store) -> None:
    worker = Worker(Pool(store, 100))
    worker.run()
    assert sorted(worker.taken) == list(range(100))
    assert max(worker.ranks) >= WINDOW


def test_in_order_with_others_looks_twice_as_far_as_they_hold(store: Store) -> None:
    other = LeaseBoard(store, "other", 10.0)
    held = [other.try_lease(Piece(number).name, None) for number in range(10)]
    worker = Worker(Pool(store, 100))

    def done_by_the_other(_: float) -> None:
        for lease in held:
            assert lease is not None
            store.write(lease.work, b"done")
            other.done(lease)

    worker.run(in_order=True, ahead=WINDOW, wait=done_by_the_other)
    assert sorted(worker.taken) == list(range(10, 100))
    assert WINDOW <= max(worker.ranks) < WINDOW + 2 * 10
    assert store.list(LEASES) == []


def test_more_is_waited_for_longer_and_longer_until_it_comes(store: Store) -> None:
    pool = Pool(store, 2, is_complete=False)
    worker = Worker(pool)
    pauses: list[float] = []

    def more(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 8:
            pool.known = 3
        if len(pauses) == 10:
            pool.is_complete = True

    worker.run(wait_for_more=more)
    assert worker.taken[2:] == [2]
    assert pauses[:3] == [0.05, 0.1, 0.2]
    assert pauses[7] == 2.0, "at most so long"
    assert pauses[8:] == [0.05, 0.1], "from the beginning, after work"


def test_what_is_in_hand_is_finished_before_more_is_waited_for(store: Store) -> None:
    pool = Pool(store, 1, is_complete=False)
    calls: list[str] = []

    def finish() -> bool:
        calls.append("finish")
        return len(calls) == 1

    def more(_: float) -> None:
        calls.append("wait")
        pool.is_complete = True

    Worker(pool).run(before_waiting=finish, wait_for_more=more)
    assert calls == ["finish", "finish", "wait"]
