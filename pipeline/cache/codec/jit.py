"""Compile a kernel with numba: no interpreter lock, kept on disk where a folder can be written.

numba keeps compiled kernels in `__pycache__` beside the source, or below NUMBA_CACHE_DIR, or in the
user's cache folder; where none of them can be written (a read-only image, no home) it refuses to
decorate at all. Then the kernels are compiled once in each process instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

__all__ = ["kernel"]

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Return `function` compiled at its first call.

    Kernels do not check array bounds: a caller proves lengths first.
    """
    try:
        return cast(F, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # "no locator available": nowhere to keep compiled code
        return cast(F, numba.njit(nogil=True)(function))
