"""A fleet as a state machine: leases, beats, take-overs, commits, deaths, on a store that fails.

Each worker has its own board over one in-memory store whose calls raise, lose their answers or cut
writes short. Whatever happens, no shard is lost and none is committed with other bytes.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.names import record_name, shard_name
from pipeline.cache.layout.records import ShardRecord, encode_record
from pipeline.errors import StoreError
from pipeline.storage import Store
from pipeline.storage import store as store_module
from pipeline.teacher.fleet.leases import LEASES, Lease, LeaseBoard
from tests.unit.cache.records import decode_record, intact_record

LEASE_S = 10.0
SHARDS = {"train-00000": ("train", 0), "heldout-00000": ("heldout", 0)}
_numbers = itertools.count()


def _data(shard: str) -> bytes:
    return f"the bytes of {shard}, a pure function of the plan".encode()


def _record(shard: str) -> ShardRecord:
    (split, index), data = SHARDS[shard], _data(shard)
    return ShardRecord(
        split=split, index=index, path=shard_name(split, index), rows=1, tokens=1, loss_tokens=1,
        entries=1, bytes=len(data), xxh3_128=checksum(data), kept_mass=1.0, entropy=0.0,
    )  # fmt: skip


@dataclass
class Faults:
    """What becomes of the next calls to the store, whoever makes them."""

    next: list[str] = field(default_factory=list)

    def take(self) -> str:
        return self.next.pop(0) if self.next else "ok"


class FaultyMemory:
    """fsspec's memory behind a way that fails."""

    def __init__(self, real: Any, faults: Faults) -> None:
        self._real, self._faults = real, faults

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if name not in ("cat_file", "pipe_file", "ls", "size", "exists", "rm_file"):
            return real

        def call(*args: Any, **options: Any) -> Any:
            fault = self._faults.take()
            if fault == "fail":
                raise ConnectionError("reset by peer")
            if fault == "cut" and name == "pipe_file":
                args = (args[0], args[1][: len(args[1]) // 2], *args[2:])
            result = real(*args, **options)
            if fault == "lost":
                raise ConnectionError("the answer was lost")
            return result

        return call


@dataclass
class Worker:
    """One process."""

    board: LeaseBoard
    holding: dict[str, Lease] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)
    paused: bool = False


class Fleet(RuleBasedStateMachine):
    """Workers that lease, beat, commit, pause and die, compared with what must always hold."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(store_module.time, "sleep", lambda _seconds: None)
        self.url = f"memory://leases-model-{next(_numbers)}"
        self.raw = Store(self.url)
        self.faults = Faults()
        self.now = 0.0
        self.workers: dict[str, Worker] = {}
        self.last_sign: dict[Lease, float] = {}
        self.given_up: set[Lease] = set()
        self.recorded: set[str] = set()

    def _new_board(self, name: str, *, faulty: bool = True) -> LeaseBoard:
        store = Store(self.url)
        if faulty:
            store._fs = FaultyMemory(store._fs, self.faults)
        return LeaseBoard(
            store, f"{name}-{next(_numbers)}", LEASE_S, lambda: self.now, is_dead=lambda _: False
        )

    def _awake(self, name: str) -> Worker | None:
        worker = self.workers.get(name)
        return None if worker is None or worker.paused else worker

    names = st.sampled_from(["a", "b", "c"])
    shards = st.sampled_from(sorted(SHARDS))

    @rule(name=names, stale=st.booleans())
    def lease(self, name: str, stale: bool) -> None:
        """One round: a new worker, or one that has time, tries every shard.

        With a stale listing it has not seen what others leased meanwhile.
        """
        worker = self.workers.setdefault(name, Worker(self._new_board(name)))
        if worker.paused:
            return
        with contextlib.suppress(StoreError):
            newest = {} if stale else worker.board.attempts()
            for shard in SHARDS:
                if shard in worker.holding:
                    continue
                lease = worker.board.try_lease(shard, newest.get(shard))
                if lease is not None:
                    self._check_take_over(lease)
                    worker.holding[shard] = lease
                    self.last_sign[lease] = self.now

    def _check_take_over(self, lease: Lease) -> None:
        """Whoever else holds the shard has given no sign for a whole lease, or let go."""
        for other in self.workers.values():
            their = other.holding.get(lease.work)
            if their is None or lease.work in self._really_recorded():
                continue
            assert their.attempt < lease.attempt
            assert self.now - self.last_sign[their] >= LEASE_S, "taken from a living worker"

    @rule(name=names)
    def beat(self, name: str) -> None:
        worker = self._awake(name)
        if worker is None:
            return
        before = {lease: self._raw(lease.path) for lease in worker.holding.values()}
        worker.board.beat()
        for lease, content in before.items():
            if self._raw(lease.path) != content:
                self.last_sign[lease] = self.now

    @rule(name=names, shard=shards)
    def write_data(self, name: str, shard: str) -> None:
        worker = self._awake(name)
        if worker is None or shard not in worker.holding:
            return
        store, record = worker.board.store, _record(shard)
        try:
            if intact_record(store, record.split, record.index, check_bytes=False) is None:
                store.write(record.path, _data(shard))
                worker.written.add(shard)
            else:
                self._let_go(worker, shard)
        except StoreError:
            self._ends_with_an_error(name)

    @rule(name=names, shard=shards)
    def write_record(self, name: str, shard: str) -> None:
        worker = self._awake(name)
        if worker is None or shard not in worker.written:
            return
        record = _record(shard)
        try:
            worker.board.store.write(record_name(record.split, record.index), encode_record(record))
            self._let_go(worker, shard)
        except StoreError:
            self._ends_with_an_error(name)

    def _let_go(self, worker: Worker, shard: str) -> None:
        worker.board.done(worker.holding[shard])
        worker.holding.pop(shard)
        worker.written.discard(shard)

    def _ends_with_an_error(self, name: str) -> None:
        self.workers.pop(name).board.give_up_all()

    @rule(name=names, how=st.sampled_from(["stops", "dies", "pauses or wakes"]))
    def leave(self, name: str, how: str) -> None:
        worker = self.workers.get(name)
        if worker is None:
            return
        if how == "pauses or wakes":
            worker.paused = not worker.paused
        elif how == "dies":
            self.workers.pop(name)
        elif not worker.paused:
            self._ends_with_an_error(name)

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S / 2, LEASE_S]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(kinds=st.lists(st.sampled_from(["ok", "fail", "lost", "cut"]), min_size=1, max_size=4))
    def faults_come(self, kinds: list[str]) -> None:
        self.faults.next += kinds

    @rule(calls=st.sampled_from([8, 20]))
    def the_store_goes_away(self, calls: int) -> None:
        """Long enough that trying again ends in an error, not so long that nothing ever works."""
        self.faults.next = ["fail"] * calls

    @invariant()
    def no_two_hold_the_same_attempt(self) -> None:
        recorded = self._really_recorded()  # of these the numbers begin anew
        leases = [
            lease
            for worker in self.workers.values()
            for lease in worker.holding.values()
            if lease.work not in recorded
        ]
        assert len(leases) == len(set(leases))

    @invariant()
    def what_is_recorded_stays_and_is_right(self) -> None:
        recorded = self._really_recorded()
        assert self.recorded <= recorded, "a shard was lost"
        self.recorded = recorded
        for shard in recorded:
            # A second commit may be cut short while it is under way; its size gives it away.
            data = self._raw(_record(shard).path)
            assert data is not None
            assert _data(shard).startswith(data)

    def _raw(self, name: str) -> bytes | None:
        try:
            return self.raw.read(name)
        except FileNotFoundError:
            return None

    def _really_recorded(self) -> set[str]:
        found = set()
        for shard in SHARDS:
            raw = self._raw(record_name(*SHARDS[shard]))
            record = decode_record(raw, *SHARDS[shard]) if raw else None
            if record is not None:
                assert record == _record(shard)
                found.add(shard)
        return found

    def teardown(self) -> None:
        """One worker that is left alone finishes everything, whatever lies there."""
        try:
            self.faults.next = []
            last = self._new_board("last", faulty=False)
            for _ in range(4):
                newest = last.attempts()
                for shard, where in SHARDS.items():
                    if intact_record(last.store, *where, check_bytes=False) is not None:
                        continue
                    lease = last.try_lease(shard, newest.get(shard))
                    if lease is not None:
                        last.store.write(_record(shard).path, _data(shard))
                        last.store.write(record_name(*where), encode_record(_record(shard)))
                        last.done(lease)
                self.now += LEASE_S
            for shard, where in SHARDS.items():
                assert intact_record(last.store, *where, check_bytes=True) == _record(shard)
            last.sweep()
            assert last.store.list(LEASES) == []
        finally:
            self.patch.undo()


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
