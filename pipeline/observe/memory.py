"""Memory and disk of this process and machine, in bytes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

__all__ = [
    "available_memory_bytes",
    "free_disk_bytes",
    "gpu_peak_bytes",
    "peak_rss_bytes",
    "total_memory_bytes",
]


def peak_rss_bytes(*, proc: Path = Path("/proc")) -> int:
    """Return the largest resident set this process ever had.

    `VmHWM` comes first: `ru_maxrss` is inherited through `exec`, so that a small child of a large
    parent would report the parent's peak.
    """
    kib = _proc_field(proc / "self" / "status", "VmHWM")
    if kib is not None:
        return kib * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_memory_bytes(
    *, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return the memory this process may ever use: the machine's, or its cgroup's limit."""
    kib = _proc_field(proc / "meminfo", "MemTotal")
    bounds = [limit for limit, _ in _cgroup_limits(proc, cgroup)]
    if kib is not None:
        bounds.append(kib * 1024)
    return min(bounds, default=None)


def available_memory_bytes(
    *, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return what can be allocated without swapping or being killed; none if the system hides it.

    In a container the machine's free memory is a trap: the cgroup's limit kills first. Every
    level of the hierarchy counts, and page cache that the kernel would give back counts as free.
    """
    kib = _proc_field(proc / "meminfo", "MemAvailable")
    bounds = [max(limit - used, 0) for limit, used in _cgroup_limits(proc, cgroup)]
    if kib is not None:
        bounds.append(kib * 1024)
    return min(bounds, default=None)


def free_disk_bytes(path: str | Path) -> int:
    """Return what an ordinary user may still write below `path`, which need not exist yet."""
    folder = Path(path).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def gpu_peak_bytes() -> int | None:
    """Return the most GPU memory torch ever held here; none without torch or without a GPU.

    Torch is only asked if it is loaded already: importing it to learn that there is no GPU costs
    seconds and hundreds of megabytes.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_reserved())


def _proc_field(path: Path, name: str) -> int | None:
    try:
        text = path.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    return None


def _cgroup_limits(proc: Path, cgroup: Path) -> list[tuple[int, int]]:
    """Return (limit, used) of this process's cgroup v2 and of each one above it."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    # Inside a container the path may be the host's and not exist here; then the root is ours.
    folder = cgroup / own.lstrip("/")
    if not folder.is_dir():
        folder = cgroup
    limits = []
    for level in (folder, *folder.parents):
        limit = _read_int(level / "memory.max")
        used = _read_int(level / "memory.current")
        if limit is not None and used is not None:
            limits.append((limit, max(used - _reclaimable(level), 0)))
        if level == cgroup:
            break
    return limits


def _read_int(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(level: Path) -> int:
    try:
        text = (level / "memory.stat").read_text()
    except OSError:
        return 0
    fields = dict(line.split()[:2] for line in text.splitlines() if " " in line)
    return int(fields.get("inactive_file", 0))
