"""What the reduction's kernels can do, in what sizes, and how many bytes they move; by arithmetic.

Imports neither torch nor Triton.
"""

from __future__ import annotations

import math

from pipeline.teacher.sparsify.sparse_scheme import SparseScheme

__all__ = [
    "BLOCK",
    "bytes_of_row",
    "candidate_places",
    "kernel_temperatures",
    "not_covered",
]

BLOCK = 2048
"""Logits of a row in registers at one time, 8 a thread; also the groups of top-k's border."""
_MOST_TEMPERATURES = 4
"""Each has two sums of a block's size in registers."""
_MOST_TOP_K = BLOCK // 4
"""Some 15 % more entries than k reach the border then, a few more for a smaller k."""
_MOST_VOCAB = 1 << 24
"""Ids are exact in float32 up to here."""
_ELEMENTS = ("float32", "bfloat16", "float16")


def not_covered(scheme: SparseScheme, *, vocab: int, element: str) -> str | None:
    """Return why the kernels cannot do it, in words; None where they can.

    Args:
        scheme: what is kept.
        vocab: V.
        element: type of a logit, such as `bfloat16`.
    """
    if element not in _ELEMENTS:
        return f"logits of type {element}"
    if vocab > _MOST_VOCAB:
        return f"a vocabulary of {vocab:,} tokens"
    if scheme.top_k > _MOST_TOP_K:
        return f"top-{scheme.top_k}, above {_MOST_TOP_K}"
    if len(kernel_temperatures(scheme)) > _MOST_TEMPERATURES:
        return f"more than {_MOST_TEMPERATURES} temperatures"
    return None


def kernel_temperatures(scheme: SparseScheme) -> tuple[float, ...]:
    """Return the temperatures that are summed: the scheme's, and 1, which log p needs."""
    grid = scheme.temperatures
    return grid if 1.0 in grid else (*grid, 1.0)


def candidate_places(top_k: int) -> int:
    """Return how many entries that reach the border are kept; a power of 2."""
    return max(256, 1 << (4 * top_k - 1).bit_length())


def bytes_of_row(scheme: SparseScheme, *, vocab: int, element_bytes: int) -> int:
    """Return what the kernels load and store for one row, if no border is reached by too many.

    Counted as if no cache held anything between two kernels. torch.topk over the candidates is one
    read of them and one write of what it returns.

    Args:
        scheme: what is kept.
        vocab: V.
        element_bytes: of a logit.
    """
    read = vocab * element_bytes
    columns, grid, state = 4 * scheme.num_columns, len(scheme.temperatures), 8
    label = 8 + element_bytes
    # The statistics: a read; label and its logit, two numbers for each temperature, the state.
    total = read + label + 4 + 8 * grid + state
    if scheme.top_k == 1:
        total += 8  # its key, known from the statistics
    elif scheme.top_k:
        candidates = 8 * candidate_places(scheme.top_k)
        # The border and its readers; keys written as empty, written and read again.
        total += 2 * 8 + read + 2 * candidates + 8 * _expected_candidates(scheme.top_k)
        total += 16 * scheme.top_k  # what torch.topk returns
    if scheme.rule is None:
        return total + 8 * scheme.top_k + state + columns - 4 * (1 + 2 * grid)
    used = len(scheme.rule.covered)
    total += 8 if scheme.top_k else 0  # key of the last
    return total + read + 16 + 4 + 4 * used + state + columns - 4 * (1 + 2 * grid)


def _expected_candidates(top_k: int) -> int:
    """Return how many entries reach the border where no group is special."""
    return math.ceil(-BLOCK * math.log(1 - top_k / BLOCK))
