"""Which way a GPU reduces logits: by the Triton kernels, else by compiled chains."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any

import torch

from pipeline.teacher.sparsify.gpu.chains import chained_sparsify
from pipeline.teacher.sparsify.gpu.plan import not_covered
from pipeline.teacher.sparsify.sparse_scheme import SparseScheme

__all__ = ["reduction_on_gpu", "sparsify_on_gpu"]

_log = logging.getLogger(__name__)


class _State:
    """Of this process."""

    failed = False
    """Whether a kernel could not be compiled or launched, after which the chains serve."""


def reduction_on_gpu(scheme: SparseScheme, *, vocab: int, element: str) -> tuple[str, str]:
    """Return `kernels`, or `chains` and why, in words.

    Args:
        scheme: what is kept.
        vocab: V.
        element: type of a logit, such as `bfloat16`.
    """
    if not _has_triton():
        return "chains", "Triton is not installed"
    reason = not_covered(scheme, vocab=vocab, element=element)
    return ("kernels", "") if reason is None else ("chains", reason)


def sparsify_on_gpu(
    logits_RV: torch.Tensor, label_R: torch.Tensor, scheme: SparseScheme, noise_R: torch.Tensor
) -> torch.Tensor:
    """Reduce rows of logits to columns; arguments and result are those of `device.sparsify`."""
    element = str(logits_RV.dtype).removeprefix("torch.")
    way, reason = reduction_on_gpu(scheme, vocab=logits_RV.shape[1], element=element)
    if way == "kernels" and not _State.failed:
        try:
            from pipeline.teacher.sparsify.gpu.launch import triton_sparsify

            device_of: Any = torch.cuda.device_of
            with device_of(logits_RV):  # Triton launches on the current one
                return triton_sparsify(logits_RV, label_R, scheme, noise_R)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Whatever Triton and the compilers that it starts raise.
            _State.failed = True
            first = (str(error).strip().splitlines() or [""])[0]
            reason = f"{type(error).__name__}: {first}"
    if reason:
        _say(reason)
    return chained_sparsify(logits_RV, label_R, scheme, noise_R)


@cache
def _say(reason: str) -> None:
    _log.warning("logits are reduced without the Triton kernels, several times as slowly: %s",
                 reason)  # fmt: skip


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
