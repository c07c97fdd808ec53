"""Which process holds a lease, and whether it has died, where it ran on this machine."""

from __future__ import annotations

import os
import socket
import uuid
from typing import Any

__all__ = ["describe_process", "has_died_here", "worker_name"]


def worker_name() -> str:
    """Return a name that no other worker has, readable in a lease file.

    In a job's pod it begins with the replica's index, so that a lease, a log line and a metric lead
    to `kubectl logs`.
    """
    replica = os.environ.get("DISTILL_REPLICA_INDEX")
    role = f"worker-{replica}-" if replica else ""
    return f"{role}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def describe_process() -> dict[str, Any]:
    """Return what lets another process of this machine see that this one has died."""
    return {"host": _machine(), "pid": os.getpid(), "started": _start_time(os.getpid())}


def has_died_here(owner: dict[str, Any]) -> bool:
    """Return whether a lease's owner was a process of this very boot of this machine, and is gone.

    Without this, the same command after kill -9 would wait for the lease of its own dead leases.
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
