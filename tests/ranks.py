"""Several ranks of one run of stage two, as forks of the tests' fork server."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

from tests.stage_runner import Result, Running

__all__ = ["free_port", "run_ranks", "start_ranks"]


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(
    start: Callable[..., Running],
    world: int,
    flags: Sequence[object],
    *,
    hooks: dict[int, tuple[Any, ...]] | None = None,
    env: dict[str, str] | None = None,
) -> list[Running]:
    """Start `world` ranks as torchrun would, `hooks` by rank; one alone gets no variables."""
    if world == 1:
        return [start("train_student", flags, hook=(hooks or {}).get(0, ()), env=env)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(
            "train_student",
            flags,
            hook=(hooks or {}).get(rank, ()),
            env={
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                **meeting,
                **(env or {}),
            },
        )
        for rank in range(world)
    ]


def run_ranks(
    start: Callable[..., Running], world: int, flags: Sequence[object], **options: Any
) -> list[Result]:
    """Run them to their ends."""
    return [rank.wait(200) for rank in start_ranks(start, world, flags, **options)]
