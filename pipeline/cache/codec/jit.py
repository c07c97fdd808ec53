"""Compile a kernel with numba: without the interpreter lock, cached on disk where possible.

numba keeps compiled kernels in `__pycache__` beside the source, or below NUMBA_CACHE_DIR, or in the
user's cache folder; where none of them is writable (a read-only image, no home) it raises an error
when decorating. Then the kernels are compiled once in each process instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

__all__ = ["inlined", "kernel", "reordered"]

F = TypeVar("F", bound=Callable[..., Any])

_REORDERED = {"reassoc", "contract", "nsz"}


def kernel(function: F) -> F:
    """Return `function` compiled at its first call.

    Kernels do not check array bounds: callers check the lengths first.
    """
    return _compiled(function)


def reordered(function: F) -> F:
    """Return a kernel whose sums of floats may be taken in any order, and fused with products.

    In the order of the code a sum waits for each addition; in any order it takes vector
    instructions. NaN and infinite numbers are kept.
    """
    return _compiled(function, fastmath=_REORDERED)


def inlined(function: F) -> F:
    """Return a function that becomes part of each kernel that calls it, with the kernel's rules."""
    return cast(F, numba.njit(inline="always")(function))


def _compiled(function: F, **options: Any) -> F:
    try:
        return cast(F, numba.njit(cache=True, nogil=True, **options)(function))
    except RuntimeError:  # "no locator available": no folder for compiled code
        return cast(F, numba.njit(nogil=True, **options)(function))
