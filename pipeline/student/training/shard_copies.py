"""Whether and where a node keeps copies of a remote cache's shards."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from pipeline.amounts import format_bytes
from pipeline.cache.io.local_copies import LocalCopies
from pipeline.cache.io.reader import Cache
from pipeline.data.settings import DataSettings
from pipeline.storage.local_folder import local_folder
from pipeline.student.training.distributed import Distributed

__all__ = ["open_local_copies"]

_log = logging.getLogger(__name__)

_MEMORY = ("tmpfs", "ramfs")
_MOUNTS = Path("/proc/self/mounts")


def open_local_copies(
    cache: Cache, data: DataSettings, distributed: Distributed
) -> LocalCopies | None:
    """Return the copies that the settings ask for; None: shards are read from the store each time.

    With `auto` several processes of a node share copies of a remote cache: a shard that a lane's
    end is in, and from the second epoch on all of the node's shards, come from its disk.
    """
    limit = int(data.disk_cache_gib * (1 << 30))
    if data.disk_cache == "off":
        return None
    if data.disk_cache != "auto":
        return LocalCopies(data.disk_cache, limit)
    if cache.store.is_local or _processes_here(distributed) == 1:
        return None
    folder = local_folder("shards")
    reason = _reason_against(folder)
    if folder is None or reason is not None:
        if distributed.is_first:
            _log.info(
                "no local copies of the cache's shards: %s; data.disk_cache names one", reason
            )
        return None
    # What is there is part of what may be there: else each start would halve the limit.
    room = shutil.disk_usage(folder).free + sum(
        copy.size_bytes for copy in LocalCopies.stored(folder)
    )
    limit = min(limit, room // 2)
    if distributed.local_rank == 0:
        _log.info(
            "copies of the cache's shards are kept in %s, up to %s; data.disk_cache off "
            "keeps none", folder, format_bytes(limit),
        )  # fmt: skip
    return LocalCopies(folder, limit)


def _processes_here(distributed: Distributed) -> int:
    """Return the processes of this node, as the launcher says; else those of the run."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return distributed.world_size


def _reason_against(folder: Path | None) -> str | None:
    if folder is None:
        return "no folder for them can be written to"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "a pod is evicted at a limit of local disk that it cannot see"
    if _is_memory(folder):
        return f"{folder} is in memory"
    return None


def _is_memory(folder: Path) -> bool:
    """Whether a folder's file system takes memory: copies there would end the training."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    place, best, kind = folder.resolve(), -1, ""
    for line in lines:
        _, mount, found, *_ = line.split(" ")
        root = Path(mount)
        # The last of several mounts on one place is the one in use.
        if place.is_relative_to(root) and len(root.parts) >= best:
            best, kind = len(root.parts), found
    return kind in _MEMORY
