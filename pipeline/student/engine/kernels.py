"""Other packages' kernels for the layers of the body: norms, rotary positions, MLPs."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from pipeline.errors import ConfigError
from pipeline.program import how_to_install

__all__ = ["apply_kernels", "check_kernels"]

_PACKAGES = {"liger": ("liger_kernel", "liger-kernel"), "hub": ("kernels", "kernels")}
"""By the choice: the module, and the package that brings it."""


def check_kernels(choice: str, *, on_gpu: bool) -> None:
    """Reject kernels that this machine cannot run.

    Args:
        choice: `none`, `liger` or `hub`.
        on_gpu: whether the student is trained on one.

    Raises:
        ConfigError: no GPU, or no package.
    """
    if choice == "none":
        return
    if not on_gpu:
        raise ConfigError(
            f"student.kernels: found {choice} on a machine without a GPU", expected="none"
        )
    module, package = _PACKAGES[choice]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"student.kernels: found {choice} without the package {package}",
            expected="it, or none",
            do=how_to_install("student", package),
        )


def apply_kernels(model: Any, choice: str) -> None:
    """Replace layers of the body by those of the chosen package; the head keeps our loss.

    Raises:
        ConfigError: the package has none for this architecture, or cannot be used.
    """
    if choice == "none":
        return
    kind = model.config.model_type
    if choice == "liger":
        patching = importlib.import_module("liger_kernel.transformers.monkey_patch")
        if kind not in patching.MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise ConfigError(
                f"student.kernels: found liger, which has none for {kind}", expected="hub or none"
            )
        # It leaves out what an architecture's function does not take.
        patching._apply_liger_kernel_to_instance(
            model=model, cross_entropy=False, fused_linear_cross_entropy=False
        )
        return
    model.train()  # kernels without a backward pass are left out
    try:
        model.set_use_kernels(True)
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(
            f"student.kernels: found hub, which cannot be used for {kind} "
            f"({str(error).strip().splitlines()[0]})",
            expected="kernels in the hub's cache, or a hub that can be reached",
            do="download them once with the network on, or choose liger or none",
        ) from error
