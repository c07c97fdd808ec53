"""Whether models run on a GPU; a GPU that torch cannot use is refused, not passed over."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from pipeline.errors import ConfigError, ResourceError

__all__ = ["DEVICE_VARIABLE", "may_use_gpu", "uses_gpu"]

DEVICE_VARIABLE = "DISTILL_DEVICE"
_GPU_NAMES = ("gpu", "cuda")
_DEVICES = Path("/dev")
_DRIVER = Path("/proc/driver/nvidia/version")
_OLDEST_DRIVER = {"12": 525, "13": 580}
"""By the major version of CUDA: the oldest driver that runs it."""


def uses_gpu() -> bool:
    """Return whether models run on a GPU; makes no CUDA context.

    `DISTILL_DEVICE=cpu` and an empty `CUDA_VISIBLE_DEVICES` choose the CPU, `DISTILL_DEVICE=gpu`
    asks for a GPU.

    Raises:
        ConfigError: another value of `DISTILL_DEVICE`.
        ResourceError: this machine has a GPU, or one is asked for, and torch cannot use it.
    """
    wanted = os.environ.get(DEVICE_VARIABLE, "")
    if wanted not in ("", "cpu", *_GPU_NAMES):
        raise ConfigError(f"{DEVICE_VARIABLE} is {wanted!r}", expected="cpu, gpu or nothing")
    if wanted == "cpu":
        return False
    import torch

    if torch.cuda.is_available():
        return True
    if wanted in _GPU_NAMES or (_has_gpu() and not _is_hidden()):
        raise _unusable(torch.__version__, torch.version.cuda)
    return False


def may_use_gpu() -> bool:
    """Return whether models may run on a GPU, by the machine's devices alone; imports no torch."""
    wanted = os.environ.get(DEVICE_VARIABLE, "")
    return wanted != "cpu" and (bool(wanted) or (_has_gpu() and not _is_hidden()))


def _has_gpu() -> bool:
    """Whether a GPU is given to this machine or container; its driver alone may be the host's."""
    return any(_DEVICES.glob("nvidia[0-9]*"))


def _is_hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")


def _unusable(torch_version: str, cuda: str | None) -> ResourceError:
    """Return the error for a GPU that torch does not see."""
    driver = _driver_version()
    found = f"the GPU cannot be used by torch {torch_version}: "
    on_cpu = f"or run on the CPU with {DEVICE_VARIABLE}=cpu"
    if cuda is None:
        return ResourceError(
            f"{found}it is a build for CPUs",
            expected="a build for GPUs",
            do=f"install the environment of this GPU machine (`make setup`), {on_cpu}",
        )
    if driver is None:
        return ResourceError(
            f"{found}there is no NVIDIA driver",
            expected=f"a driver for CUDA {cuda}",
            do=f"install it, {on_cpu}",
        )
    oldest = _OLDEST_DRIVER.get(cuda.split(".")[0])
    if oldest is not None and int(driver.split(".")[0]) < oldest:
        return ResourceError(
            f"{found}its driver is {driver}",
            expected=f"{oldest} or newer, for CUDA {cuda}",
            do=f"update the driver, {on_cpu}",
        )
    return ResourceError(
        f"{found}driver {driver}, CUDA {cuda}, and torch finds no device",
        expected="a device that `nvidia-smi` lists and CUDA_VISIBLE_DEVICES does not hide",
        do=f"see what `python -c 'import torch; torch.cuda.init()'` says, {on_cpu}",
    )


def _driver_version() -> str | None:
    """Return such as `570.124.06`; None where there is no driver."""
    try:
        text = _DRIVER.read_text(encoding="utf-8", errors="replace").split("\n")[0]
        found = re.search(r"\s(\d+(\.\d+)+)\s", text)
        if found:
            return found[1]
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    first = said.strip().split("\n")[0]
    return first if re.fullmatch(r"\d+(\.\d+)+", first) else None
