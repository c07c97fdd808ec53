"""The processes of one training run: ranks from any launcher, or a group of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.errors import ConfigError, DistillError

__all__ = ["Distributed", "peer_errors", "read_distributed"]

_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "timed out")
_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Distributed:
    """Which rank this process is, of how many."""

    rank: int
    local_rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0


def read_distributed() -> Distributed:
    """Read what torchrun, accelerate or the deepspeed launcher set; else be a group of one.

    Raises:
        ConfigError: a launcher set a part of the variables, or values that contradict.
    """
    present = {name: os.environ[name] for name in _NAMES if os.environ.get(name)}
    if "RANK" not in present and "WORLD_SIZE" not in present:
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            # Whichever is free: nobody else has to find it, and two runs cannot choose the same.
            MASTER_PORT="0",
        )
        return Distributed(rank=0, local_rank=0, world_size=1)
    missing = [name for name in _NAMES if name not in present]
    if missing:
        raise ConfigError(
            f"the launcher set {', '.join(present)} but not {', '.join(missing)}",
            expected="torchrun, accelerate launch or the deepspeed launcher to set all five",
            do="start with torchrun --nproc-per-node 2 --shutdown-timeout 570",
        )
    try:
        rank, local, size = (int(present[name]) for name in _NAMES[:3])
    except ValueError:
        raise ConfigError(
            f"RANK, LOCAL_RANK and WORLD_SIZE are {[present[name] for name in _NAMES[:3]]}",
            expected="integers",
        ) from None
    if not 0 <= rank < size:
        raise ConfigError(
            f"RANK is {rank} in a WORLD_SIZE of {size}", expected="a rank below the size"
        )
    return Distributed(rank=rank, local_rank=local, world_size=size)


@contextmanager
def peer_errors(distributed: Distributed) -> Iterator[None]:
    """While open, a collective that fails says that a peer is gone, instead of a gloo trace.

    Raises:
        DistillError: a peer died, or did not answer within the timeout.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if distributed.world_size == 1 or not any(word in text for word in _LOST):
            raise
        raise DistillError(
            f"rank {distributed.rank} lost another rank ({text.strip().splitlines()[0][:160]})",
            do="run the same command again; it goes on from the last complete checkpoint",
        ) from error
