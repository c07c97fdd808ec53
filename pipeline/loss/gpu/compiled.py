"""Fuses the many small operations of the [N, K] part into a few kernels, by torch.compile.

On a GPU each of 90 to 160 operations on a chunk's entries costs a launch, whatever its size. The
functions are compiled at their first call, for any number of tokens and entries. Where that fails
(no C compiler, no Python.h), one warning says so and they run as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import torch

__all__ = ["Compiled"]

_log = logging.getLogger(__name__)


class Compiled:
    """A pure function and its compiled form; calls take the same arguments.

    Args:
        function: changes none of its arguments, so that a failed call can be made again.
        backend: of torch.compile.
        what: it is a part of, for the warning.
    """

    def __init__(
        self, function: Callable[..., Any], *, backend: str = "inductor", what: str = "the loss"
    ) -> None:
        """Compile nothing yet."""
        self._what = what
        self._function = function
        self._backend = backend
        self._compiled: Callable[..., Any] | None = None
        self.failed = False
        """Whether compiling failed, after which the plain function serves."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns."""
        if self.failed:
            return self._function(*args, **kwargs)
        if self._compiled is None:
            self._compiled = torch.compile(
                cast(Any, self._function), dynamic=True, backend=self._backend
            )
        try:
            return self._compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Whatever Inductor, Triton or the compiler that they start raise.
            self.failed = True
            error = getattr(error, "inner_exception", error)  # torch's own says only where
            first = (str(error).strip().splitlines() or [""])[0]
            _log.warning(
                "%s runs without compiled kernels, in more and smaller ones: %s: %s",
                self._what,
                type(error).__name__,
                first,
            )
            return self._function(*args, **kwargs)
