"""The GPU or CPU slots of this machine: a set of GPUs each, or a share of the CPU threads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.models.device import uses_gpu

__all__ = ["Slot", "make_slots", "visible_gpus"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot, by the environment that its run gets."""

    number: int
    environment: dict[str, str]


def make_slots(
    parallel: int,
    *,
    nproc: int,
    gpus: tuple[str, ...],
    cpus: int,
    environment: Mapping[str, str],
) -> list[Slot]:
    """Divide the machine among `parallel` runs of `nproc` processes.

    Args:
        parallel: runs at a time.
        nproc: processes of one run, each on a GPU of its own where there are any.
        gpus: names of the GPUs, as `CUDA_VISIBLE_DEVICES` takes them; empty on a CPU.
        cpus: cores that this process may use.
        environment: the caller's; a number of threads that the user chose is kept.

    Raises:
        ConfigError: fewer GPUs than processes.
    """
    if gpus and parallel * nproc > len(gpus):
        raise ConfigError(
            f"--parallel {parallel} with --nproc {nproc}: {parallel * nproc} processes",
            expected=f"at most the {len(gpus)} GPUs that can be seen",
            do="use a smaller --parallel or --nproc",
        )
    threads = str(max(1, cpus // (parallel * nproc)))
    slots = []
    for number in range(parallel):
        own = {}
        if gpus:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[number * nproc : (number + 1) * nproc])
        # Alone on the machine a run divides the cores as it always does: same bits as by hand.
        elif parallel > 1 and "OMP_NUM_THREADS" not in environment:
            own["OMP_NUM_THREADS"] = threads
        slots.append(Slot(number, own))
    return slots


def visible_gpus() -> tuple[str, ...]:
    """Return the names of the GPUs that this process may use; empty on a CPU."""
    import torch

    if not uses_gpu():
        return ()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return tuple(name.strip() for name in named.split(","))
    return tuple(str(index) for index in range(torch.cuda.device_count()))
