"""What must be true of this process before vLLM starts in it, and of those that vLLM starts."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Mapping
from typing import Any

from pipeline.models.resolve import most_positions

__all__ = [
    "WORKERS",
    "before_cuda",
    "let_vllm_look_at_llvmlite",
    "let_vllm_read_all_positions",
    "set_environment",
]

WORKERS = "DISTILL_VLLM_WORKERS"
"""Set while this project's vLLM runs: its plugin acts on processes of this project alone."""


def before_cuda() -> None:
    """Set what has to be set before the first call of torch.cuda, unless the user has set it.

    vLLM sets the first of these when it is imported, which is too late: whoever has asked torch
    for a GPU by then has opened CUDA, and a process that vLLM forks afterwards cannot use it.
    The device is asked of the driver's library instead, and vLLM's workers are started afresh:
    a fork would also copy the threads' locks that keep the leases, in whatever state.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def set_environment(device: str, *, processes: int = 1, batch_invariant: bool = False) -> None:
    """Set what vLLM reads from the environment, unless the user has set it.

    Args:
        device: `cuda` or `cpu`.
        processes: that share the teacher; on a CPU they share its cores.
        batch_invariant: choose kernels whose results do not depend on the batch.
    """
    before_cuda()
    if batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    os.environ[WORKERS] = "1"
    # The scheduler in this process sees all sequences of a call before its first step: the same
    # call forms the same batches. In a process of its own it takes them as they arrive.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "1")
    if device == "cpu":
        # vLLM keeps one core for itself by default, which is half of a small machine.
        cores = sorted(os.sched_getaffinity(0))
        shares = [",".join(map(str, cores[rank::processes])) for rank in range(processes)]
        bound = "|".join(shares) if len(cores) >= processes else "nobind"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", bound)
        # Even in eager mode small helpers are compiled, minutes for nothing on a CPU.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def let_vllm_read_all_positions(config: Mapping[str, Any], max_length: int) -> None:
    """Let vLLM take samples as long as the model has positions.

    It refuses a model length of one more, though the token that it keeps room for is generated at
    most, never read.
    """
    if max_length == most_positions(config):
        os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")


def let_vllm_look_at_llvmlite() -> None:
    """Let `vars` reject llvmlite's library object, as it does every object without attributes.

    vLLM 0.32 looks through all loaded modules for objects whose `vars` name a kernel. llvmlite's
    answers ANY name, `__dict__` too, with a function of the library, and the engine dies of
    "'_lib_fn_wrapper' object has no attribute 'get'" wherever numba was loaded before it: when a
    cache is read first, as `repair` does.
    """
    with contextlib.suppress(ImportError, AttributeError):
        library = importlib.import_module("llvmlite.binding.ffi")._lib_wrapper
        answer = library.__getattr__
        if getattr(answer, "rejects_dunder", False):
            return

        def attribute(self: Any, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return answer(self, name)

        attribute.rejects_dunder = True  # type: ignore[attr-defined]
        library.__getattr__ = attribute
