"""Who makes which shard: claims by atomic create, kept alive by a counter, taken over when dead.

A claim of shard S is a file `_meta/claims/S.N.json`, N counting the attempts from 0. Its owner
rewrites it with a rising counter. Another worker may try attempt N + 1 once it has *watched* the
file stand still for the lease by its own clock: no clocks of two machines are compared, no file
times are trusted. Both the first claim and a take-over are one create-only write, which local
disks, NFS, Lustre and object stores all decide for exactly one worker.

An attempt that ended badly (its process died, or its engine was lost) counts as a try of the shard;
one that was given up on purpose (SIGTERM, a full disk) does not.

A claim only saves work. What makes a shard count is its record; a worker that was paused past its
lease and wakes up makes the same bytes again, and nothing is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import StoreError
from pipeline.storage import Store

__all__ = ["CLAIMS", "Claim", "ClaimBoard", "breadcrumb_name", "worker_name"]

CLAIMS = "_meta/claims"
_BEATS_PER_LEASE = 5
_LOOKS_PER_LEASE = 20
_GIVEN_UP = "given up"
_FAILED = "failed"
_PARTING_S = 3.0
"""For the last words to a store that hangs; Kubernetes kills 30 s after SIGTERM."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A shard that this worker may make."""

    shard: str
    """`train-00000`."""
    attempt: int
    """0 for the first worker, 1 after one take-over, ..."""

    @property
    def path(self) -> str:
        """Where the claim lies."""
        return f"{CLAIMS}/{self.shard}.{self.attempt}.json"


def breadcrumb_name(shard: str) -> str:
    """Return the path of a shard's breadcrumb (`breadcrumb.py`); no claim has such a name."""
    return f"{CLAIMS}/{shard}.probe.json"


@dataclass(slots=True)
class _Watched:
    """Another worker's claim as last seen, and since when it looks like that."""

    content: bytes
    since: float
    looked: float


@dataclass(slots=True)
class ClaimBoard:
    """The claims of one worker on one cache. Safe to use from the worker's own threads."""

    store: Store
    worker: str
    lease_s: float
    clock: Callable[[], float] = time.monotonic
    is_dead: Callable[[dict[str, Any]], bool] = field(default_factory=lambda: _died_here)
    _held: dict[Claim, int] = field(default_factory=dict)
    _watched: dict[str, _Watched] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def attempts(self) -> dict[str, int]:
        """Return the newest attempt of each claimed shard, by one listing."""
        newest: dict[str, int] = {}
        for name in self.store.list(CLAIMS):
            shard, number, *rest = name.rsplit(".", 2)
            if rest == ["json"] and number.isdigit():
                newest[shard] = max(newest.get(shard, 0), int(number))
        return newest

    def try_claim(self, shard: str, newest: int | None) -> Claim | None:
        """Claim `shard` if it is free, given up, or its owner has stood still for the lease.

        Args:
            shard: its name.
            newest: its newest attempt from `attempts`, None where there is none.

        Returns:
            The claim, or None where another worker has it or was faster.
        """
        attempt = 0
        if newest is not None:
            current = Claim(shard, newest)
            if not self._is_free(current):
                return None
            attempt = newest + 1
        claim = Claim(shard, attempt)
        content = self._content(beat=0, state="working")
        # Not synced: a power cut ends its owner as well, and costs what the claim would save.
        if not self.store.create(claim.path, content, sync=False):
            return None
        with self._lock:
            self._held[claim] = 0
        return claim

    def bad_ends(self, claim: Claim) -> int:
        """Return how many attempts of the shard before this one ended badly."""
        count = 0
        for attempt in range(claim.attempt):
            try:
                state = _parse(self.store.read(Claim(claim.shard, attempt).path)).get("state")
            except FileNotFoundError:
                continue
            count += state != _GIVEN_UP
        return count

    def beat(self) -> None:
        """Raise the counter of every claim held.

        A store that fails in passing is no reason to stop: the next beat tries again, and past the
        lease another worker takes over, which costs work but no shard.
        """
        # Writing under the lock: a beat after `done` would bring a removed claim back.
        with self._lock:
            for claim, count in list(self._held.items()):
                self._held[claim] = count + 1
                with contextlib.suppress(StoreError):
                    content = self._content(beat=count + 1, state="working")
                    self.store.write(claim.path, content, once=True)

    def give_up(self, claim: Claim, *, badly: bool = False) -> None:
        """Let go of a shard that was not made, so that others need not wait for the lease.

        Args:
            claim: what was held.
            badly: the shard broke the engine; counts as a try of it.
        """
        with self._lock:
            self._held.pop(claim, None)
        state = _FAILED if badly else _GIVEN_UP
        self.store.write(claim.path, self._content(beat=0, state=state))

    def done(self, claim: Claim) -> None:
        """Remove the claims of a shard whose record is committed."""
        with self._lock:
            self._held.pop(claim, None)
        for attempt in range(claim.attempt + 1):
            self.store.delete(Claim(claim.shard, attempt).path)
        if claim.attempt:
            self.store.delete(breadcrumb_name(claim.shard))

    def give_up_all(self, *, badly: bool = False) -> None:
        """Let go of everything, as far as the store lets us within a few seconds.

        What cannot be said to the others they find out by the lease.
        """

        def say() -> None:
            with self._lock:
                held = list(self._held)
            for claim in held:
                with contextlib.suppress(StoreError):
                    self.give_up(claim, badly=badly)

        # On a thread: the store may hang, and so may a beat that holds the lock.
        thread = threading.Thread(target=say, name="claims-give-up", daemon=True)
        thread.start()
        thread.join(_PARTING_S)

    def sweep(self) -> None:
        """Remove what dead workers left, once every shard has its record."""
        for name in self.store.list(CLAIMS):
            self.store.delete(f"{CLAIMS}/{name}")

    def beating(self) -> _Heart:
        """Return a context in which a thread keeps the held claims alive."""
        return _Heart(self)

    @property
    def _look_s(self) -> float:
        return self.lease_s / _LOOKS_PER_LEASE

    def _is_free(self, claim: Claim) -> bool:
        now = self.clock()
        seen = self._watched.get(claim.path)
        if seen is not None and now < min(seen.since + self.lease_s, seen.looked + self._look_s):
            return False  # so that many who wait do not read every claim all the time
        try:
            content = self.store.read(claim.path)
        except FileNotFoundError:
            # Its owner has just committed; the caller's next look at the records says so.
            self._watched.pop(claim.path, None)
            return False
        owner = _parse(content)
        if owner.get("state") in (_GIVEN_UP, _FAILED) or self.is_dead(owner):
            return True
        if seen is None or seen.content != content:
            self._watched[claim.path] = _Watched(content, now, now)
            return False
        seen.looked = now
        return now - seen.since >= self.lease_s

    def _content(self, *, beat: int, state: str) -> bytes:
        data = {"worker": self.worker, "beat": beat, "state": state, **_process()}
        return json.dumps(data, sort_keys=True).encode()


class _Heart:
    """A thread that beats a few times per lease."""

    def __init__(self, board: ClaimBoard) -> None:
        self._board = board
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="claims-heartbeat", daemon=True)

    def __enter__(self) -> _Heart:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_PARTING_S)  # a beat may hang in the store; the thread is a daemon

    def _run(self) -> None:
        while not self._stop.wait(self._board.lease_s / _BEATS_PER_LEASE):
            self._board.beat()


def worker_name() -> str:
    """Return a name that no other worker has, readable in a claim file.

    In a job's pod it begins with the replica's index, so that a claim, a log line and a metric lead
    to `kubectl logs`.
    """
    replica = os.environ.get("DISTILL_REPLICA_INDEX")
    role = f"worker-{replica}-" if replica else ""
    return f"{role}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _process() -> dict[str, Any]:
    """What lets another process of this machine see that this one has died."""
    return {"host": _machine(), "pid": os.getpid(), "started": _start_time(os.getpid())}


def _died_here(owner: dict[str, Any]) -> bool:
    """Whether the claim's owner was a process of this very boot of this machine, and is gone.

    Without this, the same command after kill -9 would wait for the lease of its own dead claims.
    """
    if owner.get("host") != _machine() or not isinstance(owner.get("pid"), int):
        return False
    return bool(_start_time(owner["pid"]) != owner.get("started"))


def _machine() -> str:
    """Name of this boot and process namespace: containers of one node see other pids."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}/{uuid.uuid4().hex}"  # never equal: wait for the lease


def _start_time(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; tells it from a later one of that pid."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie holds its pid until its parent looks, but works no more.
    return None if fields[0] == "Z" else fields[19]


def _parse(content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}
