"""The entry point that vLLM's processes run first: its workers end with the stage; light to import.

vLLM's own workers notice the end of their parent by a pipe and stop between two steps; one that
hangs in a kernel never comes to that, and keeps its device from the next attempt.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

from pipeline.teacher.engines.vllm_start import WORKERS, let_vllm_look_at_llvmlite

__all__ = ["register"]

_PR_SET_PDEATHSIG = 1


def register() -> None:
    """Let a process that this project's vLLM started be killed when the starting one has ended.

    The program that started it is imported in it, too, before vLLM: with numba, if need be.
    """
    if WORKERS in os.environ and "llvmlite" in sys.modules:
        let_vllm_look_at_llvmlite()
    parent = multiprocessing.parent_process()
    if parent is None or WORKERS not in os.environ:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not parent.is_alive():  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)
