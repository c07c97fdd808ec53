"""What a test can do to a stage's store, disk and memory before it runs; see `stage_hooks.py`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

__all__ = [
    "faulty_store", "full_disk", "hanging_reads", "hanging_store", "little_disk",
    "little_disk_to_reshard", "little_memory", "replace_name",
]  # fmt: skip


def little_memory(available: int) -> None:
    """Pretend that this many bytes are free."""
    for name in ("pipeline.teacher.estimate", "pipeline.student.estimate"):
        replace_name(name, "available_memory_bytes", lambda: available)


def little_disk(available: int) -> None:
    """Pretend that this many bytes of disk are free."""
    from pipeline.storage import Store

    replace_name("pipeline.student.estimate", "free_disk_bytes", lambda _path: available)
    Store.free_bytes = lambda _self: available  # type: ignore[method-assign]


def little_disk_to_reshard(available: int) -> None:
    """Pretend that this many bytes are free where a checkpoint is cut for other ranks."""
    replace_name("pipeline.student.training.reshard", "free_disk_bytes", lambda _path: available)


def full_disk(name: str) -> None:
    """Make every write of a file whose path contains `name` fail as on a full disk."""
    import errno

    from pipeline.storage import local

    real = local.write_local

    def write_local(target: str, data: bytes, **options: bool) -> None:
        if name in target:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(target, data, **options)

    replace_name("pipeline.storage.store", "write_local", write_local)


def faulty_store(fail_rate: float, cut_rate: float, delay_s: float = 0.0) -> None:
    """Make `faulty://` known, a store that fails at these rates and takes its time."""
    from tests.faulty import register

    register(fail_rate=fail_rate, cut_rate=cut_rate, delay_s=delay_s)


def hanging_store(name: str) -> None:
    """Make every write of a file whose path contains `name` wait for ever, as on a dead mount."""
    import time

    from pipeline.storage import Store

    real: Callable[..., None] = Store.write

    def write(self: Store, path: str, data: bytes, **options: bool) -> None:
        while name in path:
            time.sleep(0.1)
        real(self, path, data, **options)

    Store.write = write  # type: ignore[method-assign]


def hanging_reads(name: str) -> None:
    """Make every read of a file whose path contains `name` wait for ever, as on a dead mount."""
    import time

    from pipeline.storage import Store

    real: Callable[..., bytes] = Store.read

    def read(self: Store, path: str, **options: Any) -> bytes:
        while name in path:
            time.sleep(0.1)
        return real(self, path, **options)

    Store.read = read  # type: ignore[method-assign]


def replace_name(module: str, name: str, value: Any) -> None:
    """Let a name of a module stand for something else."""
    setattr(importlib.import_module(module), name, value)
