"""Log-probs with which the text was written: codes of 16 bits, with an error of 1/2048 nats.

Finer than a label's: they are subtracted from a student's of the same token, and where that is the
writer itself nothing is left but the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.targets import SparseTargets
from pipeline.errors import CacheError

__all__ = ["WRITTEN_COLUMNS", "written_codes", "written_values"]

WRITTEN_COLUMNS = ("written_logprob", "written_logprob_high")
"""Low and high bytes of a code a position."""
_STEPS = 1024
"""Of a nat; the last code stands for -64 and all below."""


def written_codes(targets: Sequence[SparseTargets]) -> NDArray[np.uint16]:
    """Return the codes [N] of the written log-probs of all rows.

    Raises:
        CacheError: a row without them, of another length, or with numbers that are not finite.
    """
    parts: list[NDArray[np.floating[Any]]] = [np.zeros(0, np.float64)]
    for target in targets:
        logprob_N = target.written_logprob_N
        if logprob_N is None or len(logprob_N) != target.num_positions:
            raise CacheError(
                "a sequence without the log-probs of its writer in a cache that has them"
            )
        parts.append(logprob_N)
    logprob = np.concatenate(parts).astype(np.float64)
    if not np.isfinite(logprob).all():
        raise CacheError("a log-probability of the writer is not finite")
    codes: NDArray[np.uint16] = np.clip(np.rint(logprob * -_STEPS), 0, 0xFFFF).astype(np.uint16)
    return codes


def written_values(codes_N: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return log p of each code; exact in float32."""
    return codes_N.astype(np.float32) * np.float32(-1 / _STEPS)
