"""Leases: one owner at a time, take-over of the dead, nothing left behind."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.storage import Store
from pipeline.teacher.fleet.leases import LEASES, Lease, LeaseBoard
from pipeline.teacher.fleet.processes import worker_name

LEASE_S = 10.0


class Clock:
    """A clock that tests turn by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def board(store: Store, name: str, clock: Clock) -> LeaseBoard:
    return LeaseBoard(store, name, LEASE_S, clock, is_dead=lambda owner: False)


def test_only_one_of_many_threads_gets_a_shard(store: Store) -> None:
    boards = [board(store, f"w{i}", Clock()) for i in range(8)]
    got: list[Lease] = []
    start = threading.Barrier(8)

    def race(one: LeaseBoard) -> None:
        start.wait()
        for shard in range(20):
            lease = one.try_lease(f"train-{shard:05d}", None)
            if lease is not None:
                got.append(lease)

    threads = [threading.Thread(target=race, args=(one,)) for one in boards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lease.work for lease in got) == [f"train-{shard:05d}" for shard in range(20)]


def test_a_living_owner_keeps_its_shard_past_the_lease(store: Store) -> None:
    clock = Clock()
    owner, other = board(store, "owner", clock), board(store, "other", clock)
    assert owner.try_lease("train-00000", None)
    for _ in range(10):
        clock.now += LEASE_S / 2
        owner.beat()
        assert other.try_lease("train-00000", other.attempts()["train-00000"]) is None


def test_a_still_claim_is_taken_over_only_after_being_watched(store: Store) -> None:
    clock = Clock()
    owner, other = board(store, "owner", clock), board(store, "other", clock)
    assert owner.try_lease("train-00000", None)
    clock.now += 100 * LEASE_S  # nobody has watched it: its age means nothing
    assert other.try_lease("train-00000", 0) is None
    clock.now += LEASE_S - 0.1
    assert other.try_lease("train-00000", 0) is None
    clock.now += 0.2
    taken = other.try_lease("train-00000", 0)
    assert taken == Lease("train-00000", 1)
    third = board(store, "third", clock)
    assert third.try_lease("train-00000", 0) is None  # a stale look at the listing changes nothing


def test_a_shard_given_up_is_free_at_once(store: Store) -> None:
    clock = Clock()
    owner, other = board(store, "owner", clock), board(store, "other", clock)
    lease = owner.try_lease("train-00000", None)
    assert lease is not None
    owner.give_up_all()
    assert other.try_lease("train-00000", 0) == Lease("train-00000", 1)


def test_a_dead_process_of_this_machine_is_seen_before_the_lease(store: Store) -> None:
    clock = Clock()
    owner = LeaseBoard(store, worker_name(), LEASE_S, clock)
    assert owner.try_lease("train-00000", None)
    other = LeaseBoard(store, worker_name(), LEASE_S, clock)
    assert other.try_lease("train-00000", 0) is None  # this very process is alive
    content = store.read(f"{LEASES}/train-00000.0.json")
    dead = content.replace(b'"started": "', b'"started": "9')
    assert dead != content
    store.write(f"{LEASES}/train-00000.0.json", dead)
    assert other.try_lease("train-00000", 0) is None  # it has only just looked
    clock.now += LEASE_S / 20
    assert other.try_lease("train-00000", 0) == Lease("train-00000", 1)


def test_done_removes_all_attempts_and_a_late_beat_brings_none_back(store: Store) -> None:
    clock = Clock()
    first, second = board(store, "first", clock), board(store, "second", clock)
    assert first.try_lease("train-00000", None)
    second.try_lease("train-00000", 0)
    clock.now += LEASE_S
    lease = second.try_lease("train-00000", 0)
    assert lease is not None
    second.done(lease)
    second.beat()
    assert store.list(LEASES) == []


def test_a_store_that_fails_a_beat_does_not_stop_the_worker(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = board(store, "one", Clock())
    assert one.try_lease("train-00000", None)

    def fail(name: str, data: bytes, **_options: bool) -> None:
        raise StoreError("the store is away")

    monkeypatch.setattr(store, "write", fail)
    one.beat()
    monkeypatch.undo()
    before = store.read(f"{LEASES}/train-00000.0.json")
    one.beat()
    assert store.read(f"{LEASES}/train-00000.0.json") != before


def test_a_damaged_claim_is_taken_over_after_the_lease(store: Store) -> None:
    clock = Clock()
    one = board(store, "one", clock)
    store.write(f"{LEASES}/train-00000.0.json", b"\x00not json")
    assert one.try_lease("train-00000", 0) is None
    clock.now += LEASE_S
    assert one.try_lease("train-00000", 0) == Lease("train-00000", 1)


def test_attempts_that_ended_badly_are_supervised_and_those_given_up_are_not(store: Store) -> None:
    clock = Clock()
    for attempt, badly in enumerate((True, False, True)):
        one = board(store, f"w{attempt}", clock)
        lease = one.try_lease("train-00000", attempt - 1 if attempt else None)
        assert lease == Lease("train-00000", attempt)
        assert one.bad_ends(lease) == [0, 1, 1][attempt]
        one.give_up_all(badly=badly)
    dead = board(store, "dead", clock)
    assert dead.try_lease("train-00000", 2) == Lease("train-00000", 3)
    last = board(store, "last", clock)
    last.try_lease("train-00000", 3)
    clock.now += LEASE_S
    lease = last.try_lease("train-00000", 3)
    assert lease == Lease("train-00000", 4)
    assert last.bad_ends(lease) == 3


def test_those_who_wait_do_not_read_every_claim_all_the_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    owner, other = board(store, "owner", clock), board(store, "other", clock)
    shards = [f"train-{number:05d}" for number in range(10)]
    for shard in shards:
        owner.try_lease(shard, None)
    reads: list[str] = []
    real = store.read
    monkeypatch.setattr(store, "read", lambda name: (reads.append(name), real(name))[1])
    for _ in range(1000):  # a hundred looks a second
        for shard in shards:
            assert other.try_lease(shard, 0) is None
        clock.now += 0.009
    assert len(reads) <= 10 * 21


def test_last_words_to_a_store_that_hangs_take_seconds(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = board(store, "one", Clock())
    assert one.try_lease("train-00000", None)
    monkeypatch.setattr(store, "write", lambda *_args, **_options: threading.Event().wait(60))
    begun = time.monotonic()
    one.give_up_all()
    assert time.monotonic() - begun < 10


def test_a_pods_worker_is_named_by_its_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTILL_REPLICA_INDEX", raising=False)
    assert not worker_name().startswith("worker-")
    monkeypatch.setenv("DISTILL_REPLICA_INDEX", "3")
    assert worker_name().startswith("worker-3-")
    assert worker_name() != worker_name()
