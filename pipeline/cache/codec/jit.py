"""Compile a kernel with numba: without the interpreter lock, cached on disk where possible.

numba keeps compiled kernels in `__pycache__` beside the source, or below NUMBA_CACHE_DIR, or in the
user's cache folder; where none of them is writable (a read-only image, no home) it raises an error
when decorating. Then the kernels are compiled once in each process instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

__all__ = ["kernel"]

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Return `function` compiled at its first call.

    Kernels do not check array bounds: callers check the lengths first.
    """
    try:
        return cast(F, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # "no locator available": no folder for compiled code
        return cast(F, numba.njit(nogil=True)(function))
