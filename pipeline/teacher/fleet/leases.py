"""Who does which piece of work: leases by atomic create, kept by a heartbeat, else taken over.

Shards, folds of records and the manifest are leased in the cache's `_meta/leases`, units of the
corpus and folds of their summaries in the prepared corpus's `leases`. A lease of S is a file
`S.N.json` there, N counting the attempts from 0. Its owner
rewrites it with a rising counter. Another worker may try attempt N + 1 once it has *watched* the
file stand still for the lease by its own clock: no clocks of two machines are compared, no file
times are trusted. Both the first lease and a take-over are one create-only write, which local
disks, NFS, Lustre and object stores all decide for exactly one worker.

An attempt that ended badly (its process died, or its engine was lost) counts as a try of the shard;
one that was given up on purpose (SIGTERM, a full disk) does not.

A lease only saves work. What makes a shard count is its record, a unit its summary; a worker that
was paused past its lease and wakes up makes the same bytes again, and nothing is lost.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import StoreError
from pipeline.storage import Store
from pipeline.teacher.fleet.processes import describe_process, has_died_here

__all__ = ["LEASES", "Lease", "LeaseBoard", "marker_name", "remove_leases"]

LEASES = "_meta/leases"
"""Of a cache."""
_BEATS_PER_LEASE = 5
_LOOKS_PER_LEASE = 20
_GIVEN_UP = "given up"
_FAILED = "failed"
_PARTING_S = 3.0
"""For the last words to a store that hangs; Kubernetes kills 30 s after SIGTERM."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's hold on a piece of work."""

    work: str
    """`train-00000`, `unit-00007`, `manifest`, ..."""
    attempt: int
    """0 for the first worker, 1 after one take-over, ..."""
    folder: str = LEASES

    @property
    def path(self) -> str:
        """The lease's file."""
        return f"{self.folder}/{self.work}.{self.attempt}.json"


def marker_name(shard: str) -> str:
    """Return the path of a shard's in-flight marker (`inflight.py`); no lease has such a name."""
    return f"{LEASES}/{shard}.inflight.json"


@dataclass(slots=True)
class _Watched:
    """Another worker's lease as last seen, and since when it looks like that."""

    content: bytes
    since: float
    looked: float


@dataclass(slots=True)
class LeaseBoard:
    """The leases of one worker in one folder. Safe to use from the worker's own threads."""

    store: Store
    worker: str
    lease_s: float
    clock: Callable[[], float] = time.monotonic
    is_dead: Callable[[dict[str, Any]], bool] = has_died_here
    folder: str = LEASES
    """Below the store's root."""
    is_alive: Callable[[], bool] = lambda: True
    """Whether this worker gets on; a heart of one that does not beats no more."""
    _held: dict[Lease, int] = field(default_factory=dict)
    _watched: dict[str, _Watched] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def attempts(self) -> dict[str, int]:
        """Return the newest attempt of each leased piece of work, by one listing."""
        newest: dict[str, int] = {}
        for name in self.store.list(self.folder):
            work, number, *rest = name.rsplit(".", 2)
            if rest == ["json"] and number.isdigit():
                newest[work] = max(newest.get(work, 0), int(number))
        return newest

    def try_lease(self, work: str, newest: int | None) -> Lease | None:
        """Lease `work` if it is free, given up, or its owner has stood still for the lease.

        Args:
            work: its name.
            newest: its newest attempt from `attempts`, None where there is none.

        Returns:
            The lease, or None where another worker has it or was faster.
        """
        attempt = 0
        if newest is not None:
            current = Lease(work, newest, self.folder)
            if not self._is_free(current):
                return None
            attempt = newest + 1
        lease = Lease(work, attempt, self.folder)
        content = self._content(beat=0, state="working")
        # Not synced: a power cut ends its owner as well, and costs what the lease would save.
        if not self.store.create(lease.path, content, sync=False):
            return None
        with self._lock:
            self._held[lease] = 0
        return lease

    def bad_ends(self, lease: Lease) -> int:
        """Return how many attempts before this one ended badly."""
        count = 0
        for attempt in range(lease.attempt):
            try:
                content = self.store.read(Lease(lease.work, attempt, self.folder).path)
            except FileNotFoundError:
                continue
            count += _parse(content).get("state") != _GIVEN_UP
        return count

    def beat(self) -> None:
        """Raise the counter of every lease held.

        A store that fails in passing is no reason to stop: the next beat tries again, and past the
        lease another worker takes over, which costs work and no result.
        """
        # Writing under the lock: a beat after `done` would bring a removed lease back.
        with self._lock:
            for lease, count in list(self._held.items()):
                self._held[lease] = count + 1
                with contextlib.suppress(StoreError):
                    content = self._content(beat=count + 1, state="working")
                    self.store.write(lease.path, content, once=True)

    def give_up(self, lease: Lease, *, badly: bool = False) -> None:
        """Give back what was not done, so that others need not wait for the lease.

        Args:
            lease: what was held.
            badly: the shard broke the engine; counts as a try of it.
        """
        with self._lock:
            self._held.pop(lease, None)
        state = _FAILED if badly else _GIVEN_UP
        self.store.write(lease.path, self._content(beat=0, state=state))

    def done(self, lease: Lease) -> None:
        """Remove the leases of work that is committed."""
        with self._lock:
            self._held.pop(lease, None)
        for attempt in range(lease.attempt + 1):
            self.store.delete(Lease(lease.work, attempt, self.folder).path)
        if lease.attempt and self.folder == LEASES:
            self.store.delete(marker_name(lease.work))

    def give_up_all(self, *, badly: bool = False) -> None:
        """Give back everything, as far as the store lets us within a few seconds.

        What cannot be said to the others they find out by the lease.
        """

        def say() -> None:
            with self._lock:
                held = list(self._held)
            for lease in held:
                with contextlib.suppress(StoreError):
                    self.give_up(lease, badly=badly)

        # On a thread: the store may hang, and so may a beat that holds the lock.
        thread = threading.Thread(target=say, name="leases-give-up", daemon=True)
        thread.start()
        thread.join(_PARTING_S)

    def sweep(self, keep: Lease | None = None) -> None:
        """Remove what dead workers left, once all work is done; but not `keep`."""
        remove_leases(self.store, self.folder, keep=keep)

    def beating(self) -> _Heart:
        """Return a context in which a thread keeps the held leases alive."""
        return _Heart(self)

    @property
    def _look_s(self) -> float:
        return self.lease_s / _LOOKS_PER_LEASE

    def _is_free(self, lease: Lease) -> bool:
        now = self.clock()
        seen = self._watched.get(lease.path)
        if seen is not None and now < min(seen.since + self.lease_s, seen.looked + self._look_s):
            return False  # so that many who wait do not read every lease all the time
        try:
            content = self.store.read(lease.path)
        except FileNotFoundError:
            # Its owner has just committed; the caller's next look at the records says so.
            self._watched.pop(lease.path, None)
            return False
        owner = _parse(content)
        if owner.get("state") in (_GIVEN_UP, _FAILED) or self.is_dead(owner):
            return True
        if seen is None or seen.content != content:
            self._watched[lease.path] = _Watched(content, now, now)
            return False
        seen.looked = now
        return now - seen.since >= self.lease_s

    def _content(self, *, beat: int, state: str) -> bytes:
        data = {"worker": self.worker, "beat": beat, "state": state, **describe_process()}
        return json.dumps(data, sort_keys=True).encode()


def remove_leases(store: Store, folder: str = LEASES, *, keep: Lease | None = None) -> bool:
    """Remove every lease of a folder but `keep`, whoever holds it; return whether there was any."""
    found = [f"{folder}/{name}" for name in store.list(folder)]
    kept = None if keep is None else keep.path
    for path in found:
        if path != kept:
            store.delete(path)
    return bool(found)


class _Heart:
    """A thread that beats a few times per lease."""

    def __init__(self, board: LeaseBoard) -> None:
        self._board = board
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases-heartbeat", daemon=True)

    def __enter__(self) -> _Heart:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_PARTING_S)  # a beat may hang in the store; the thread is a daemon

    def _run(self) -> None:
        while not self._stop.wait(self._board.lease_s / _BEATS_PER_LEASE):
            if self._board.is_alive():
                self._board.beat()


def _parse(content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}
