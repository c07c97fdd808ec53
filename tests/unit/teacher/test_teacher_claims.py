"""Claims: one owner at a time, take-over of the dead, nothing left behind; against a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from pipeline.errors import StoreError
from pipeline.storage import Store
from pipeline.teacher.claims import CLAIMS, Claim, ClaimBoard, worker_name

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


def board(store: Store, name: str, clock: Clock) -> ClaimBoard:
    return ClaimBoard(store, name, LEASE_S, clock, is_dead=lambda owner: False)


def test_only_one_of_many_threads_gets_a_shard(store: Store) -> None:
    boards = [board(store, f"w{i}", Clock()) for i in range(8)]
    got: list[Claim] = []
    start = threading.Barrier(8)

    def race(one: ClaimBoard) -> None:
        start.wait()
        for shard in range(20):
            claim = one.try_claim(f"train-{shard:05d}", None)
            if claim is not None:
                got.append(claim)

    threads = [threading.Thread(target=race, args=(one,)) for one in boards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claim.shard for claim in got) == [f"train-{shard:05d}" for shard in range(20)]


def test_a_living_owner_keeps_its_shard_past_the_lease(store: Store) -> None:
    clock = Clock()
    owner, other = board(store, "owner", clock), board(store, "other", clock)
    assert owner.try_claim("train-00000", None)
    for _ in range(10):
        clock.now += LEASE_S / 2
        owner.beat()
        assert other.try_claim("train-00000", other.attempts()["train-00000"]) is None


def test_a_still_claim_is_taken_over_only_after_being_watched(store: Store) -> None:
    clock = Clock()
    owner, other = board(store, "owner", clock), board(store, "other", clock)
    assert owner.try_claim("train-00000", None)
    clock.now += 100 * LEASE_S  # nobody has watched it: its age means nothing
    assert other.try_claim("train-00000", 0) is None
    clock.now += LEASE_S - 0.1
    assert other.try_claim("train-00000", 0) is None
    clock.now += 0.2
    taken = other.try_claim("train-00000", 0)
    assert taken == Claim("train-00000", 1)
    third = board(store, "third", clock)
    assert third.try_claim("train-00000", 0) is None  # a stale look at the listing changes nothing


def test_a_shard_given_up_is_free_at_once(store: Store) -> None:
    clock = Clock()
    owner, other = board(store, "owner", clock), board(store, "other", clock)
    claim = owner.try_claim("train-00000", None)
    assert claim is not None
    owner.give_up_all()
    assert other.try_claim("train-00000", 0) == Claim("train-00000", 1)


def test_a_dead_process_of_this_machine_is_seen_before_the_lease(store: Store) -> None:
    clock = Clock()
    owner = ClaimBoard(store, worker_name(), LEASE_S, clock)
    assert owner.try_claim("train-00000", None)
    other = ClaimBoard(store, worker_name(), LEASE_S, clock)
    assert other.try_claim("train-00000", 0) is None  # this very process is alive
    content = store.read(f"{CLAIMS}/train-00000.0.json")
    dead = content.replace(b'"started": "', b'"started": "9')
    assert dead != content
    store.write(f"{CLAIMS}/train-00000.0.json", dead)
    assert other.try_claim("train-00000", 0) is None  # it has only just looked
    clock.now += LEASE_S / 20
    assert other.try_claim("train-00000", 0) == Claim("train-00000", 1)


def test_done_removes_all_attempts_and_a_late_beat_brings_none_back(store: Store) -> None:
    clock = Clock()
    first, second = board(store, "first", clock), board(store, "second", clock)
    assert first.try_claim("train-00000", None)
    second.try_claim("train-00000", 0)
    clock.now += LEASE_S
    claim = second.try_claim("train-00000", 0)
    assert claim is not None
    second.done(claim)
    second.beat()
    assert store.list(CLAIMS) == []


def test_a_store_that_fails_a_beat_does_not_stop_the_worker(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = board(store, "one", Clock())
    assert one.try_claim("train-00000", None)

    def fail(name: str, data: bytes, **_options: bool) -> None:
        raise StoreError("the store is away")

    monkeypatch.setattr(store, "write", fail)
    one.beat()
    monkeypatch.undo()
    before = store.read(f"{CLAIMS}/train-00000.0.json")
    one.beat()
    assert store.read(f"{CLAIMS}/train-00000.0.json") != before


def test_a_damaged_claim_is_taken_over_after_the_lease(store: Store) -> None:
    clock = Clock()
    one = board(store, "one", clock)
    store.write(f"{CLAIMS}/train-00000.0.json", b"\x00not json")
    assert one.try_claim("train-00000", 0) is None
    clock.now += LEASE_S
    assert one.try_claim("train-00000", 0) == Claim("train-00000", 1)


def _names() -> Iterator[str]:
    count = 0
    while True:
        yield f"memory://claims-{count}"
        count += 1


_stores = _names()


class Fleet(RuleBasedStateMachine):
    """Workers that claim, beat, commit, die and wake, compared with what must always hold."""

    workers = Bundle("workers")
    shards = ("train-00000", "train-00001", "heldout-00000")

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(next(_stores))
        self.clock = Clock()
        self.alive: dict[str, ClaimBoard] = {}
        self.holding: dict[tuple[str, str], Claim] = {}
        self.last_beat: dict[Claim, float] = {}
        self.committed: set[str] = set()

    @rule(target=workers, name=st.sampled_from(["a", "b", "c"]))
    def start(self, name: str) -> str:
        if name not in self.alive:
            self.alive[name] = board(self.store, name, self.clock)
        return name

    @rule(name=workers, shard=st.sampled_from(shards), fresh=st.booleans())
    def claim(self, name: str, shard: str, fresh: bool) -> None:
        if name not in self.alive or shard in self.committed or (name, shard) in self.holding:
            return
        newest = self.alive[name].attempts().get(shard) if fresh else None
        claim = self.alive[name].try_claim(shard, newest)
        if claim is None:
            return
        for (_other, held), their in self.holding.items():
            if held == shard:
                # Taken over: then the owner has not beaten for a whole lease.
                assert their.attempt < claim.attempt
                assert self.clock.now - self.last_beat[their] >= LEASE_S
        self.holding[name, shard] = claim
        self.last_beat[claim] = self.clock.now

    @rule(name=workers)
    def beat(self, name: str) -> None:
        if name in self.alive:
            self.alive[name].beat()
            for (owner, _), claim in self.holding.items():
                if owner == name:
                    self.last_beat[claim] = self.clock.now

    @rule(name=workers, shard=st.sampled_from(shards))
    def commit(self, name: str, shard: str) -> None:
        claim = self.holding.pop((name, shard), None)
        if claim is not None and name in self.alive:
            self.committed.add(shard)
            self.alive[name].done(claim)

    @rule(name=workers)
    def die(self, name: str) -> None:
        if self.alive.pop(name, None) is not None:
            self.holding = {key: c for key, c in self.holding.items() if key[0] != name}

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def attempts_of_one_shard_are_unique(self) -> None:
        claims = list(self.holding.values())
        assert len(claims) == len(set(claims))

    def teardown(self) -> None:
        """A worker that is left alone finishes everything."""
        last = board(self.store, "last", self.clock)
        for _ in range(3 * len(self.shards)):
            newest = last.attempts()
            for shard in self.shards:
                if shard in self.committed:
                    continue
                claim = last.try_claim(shard, newest.get(shard))
                if claim is not None:
                    last.done(claim)
                    self.committed.add(shard)
            self.clock.now += LEASE_S
        assert self.committed == set(self.shards)
        last.sweep()
        assert self.store.list(CLAIMS) == []


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
