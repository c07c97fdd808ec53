"""How several processes are started and stopped, and what each takes of its machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.storage.parallel import usable_cores

__all__ = [
    "SHUTDOWN_TIMEOUT_S",
    "SHUTDOWN_VARIABLE",
    "prepare_environment",
    "threads_of_a_process",
    "torchrun_arguments",
    "use_cores",
    "use_threads",
    "warn_of_short_grace",
]

_log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 570
"""What a launcher waits after SIGTERM before it kills: the step ends and a checkpoint is written.
torchrun's own 30 s are too few for that; the pods of k8s/ have 600 s."""
SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""torchrun's variable for it, which overrules ours."""
_THREADS = "OMP_NUM_THREADS"


def torchrun_arguments(processes: int) -> list[str]:
    """Return the arguments of Python that start so many processes of the module after them."""
    timeout = os.environ.get(SHUTDOWN_VARIABLE) or str(SHUTDOWN_TIMEOUT_S)
    return [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "--shutdown-timeout", timeout,
    ]  # fmt: skip


def prepare_environment() -> None:
    """Set what torch reads once, when it is imported; what is set already stays."""
    if not os.environ.get("PYTORCH_ALLOC_CONF"):
        # Packs differ in length: fixed segments fragment.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def use_cores() -> None:
    """Let this process compute on its share of the cores, where the launcher chose one for it.

    torchrun and accelerate set OMP_NUM_THREADS to 1 where it is not set. Offloaded AdamW and the
    repair of pruned layers would then have one core each.
    """
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not processes.isdigit() or int(processes) < 2 or os.environ.get(_THREADS) != "1":
        return
    launcher = _environment_of(os.getppid())
    if launcher is None or launcher.get(_THREADS):
        return  # chosen by whoever started the launcher
    own = len(os.sched_getaffinity(0))
    threads = threads_of_a_process(
        int(processes),
        own=own,
        usable=usable_cores(),
        of_launcher=len(os.sched_getaffinity(os.getppid())),
    )
    import torch

    os.environ[_THREADS] = str(threads)  # for the processes that this one starts
    torch.set_num_threads(threads)
    _log.debug("%d threads a process", threads)


def use_threads(threads: int | None) -> None:
    """Let torch compute with so many threads from here on; None changes nothing."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def warn_of_short_grace() -> None:
    """Say it where torchrun will kill this process before a checkpoint may be written."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get(SHUTDOWN_VARIABLE):
        return
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return
    if not any(part.replace(b"_", b"-").startswith(b"--shutdown-timeout") for part in command):
        _log.warning(
            "torchrun kills its processes 30 s after SIGTERM, which may be before a checkpoint is "
            "written; start it with --shutdown-timeout %d (or set %s)",
            SHUTDOWN_TIMEOUT_S, SHUTDOWN_VARIABLE,
        )  # fmt: skip


def threads_of_a_process(processes: int, *, own: int, usable: int, of_launcher: int) -> int:
    """Return the threads of each of the processes of a machine.

    Args:
        processes: of this machine.
        own: cores that this process is bound to, such as those beside its GPU.
        usable: those of them that its container's quota allows.
        of_launcher: cores of the process that started all.
    """
    shared = min(of_launcher, usable) if usable < own else of_launcher
    return max(1, min(own, shared // processes))


def _environment_of(process: int) -> Mapping[str, str] | None:
    """Return the variables that a process was started with; None where they cannot be read."""
    try:
        content = Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return None
    pairs = (item.partition("=") for item in content.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs if name}
