"""The loop, compiled by numba, that merges requested entries into those of a scheme.

Numba does not check bounds: the caller makes sure that lengths agree.

Legend: N positions, E entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.jit import kernel

__all__ = ["merge_runs"]

Ints = NDArray[np.integer[Any]]
Reals = NDArray[np.floating[Any]]


@kernel
def merge_runs(
    has_rule: int,
    counts_N: Ints,
    always_kept_N: Ints,
    ids_E: Ints,
    logprobs_E: Reals,
    inclusion_E: Reals,
    requested_N: Ints,
    requested_ids: Ints,
    requested_logprobs: Reals,
    out_N: Ints,
    out_ids: Ints,
    out_logprobs: Reals,
    out_inclusion: Reals,
    out_requested: NDArray[np.bool_],
) -> int:
    """Write each position's entries with the requested ones among them; returns how many in all.

    With `has_rule` 1 a position's first entry is its label, and a requested value goes before an
    always-kept one. Outputs have room for both; inclusion comes in as ones, requested as false.
    """
    at, begin, to = 0, 0, 0
    for n in range(len(counts_N)):
        first = to
        stop, end = at + counts_N[n], begin + requested_N[n]
        if has_rule:
            out_ids[to], out_logprobs[to] = ids_E[at], logprobs_E[at]
            at += 1
            to += 1
        kept_stop, ask = at + always_kept_N[n], begin
        while at < kept_stop or ask < end:
            if ask >= end or (at < kept_stop and ids_E[at] < requested_ids[ask]):
                out_ids[to], out_logprobs[to] = ids_E[at], logprobs_E[at]
                at += 1
            elif at >= kept_stop or requested_ids[ask] < ids_E[at]:
                out_ids[to], out_logprobs[to] = requested_ids[ask], requested_logprobs[ask]
                out_requested[to] = True
                ask += 1
            else:
                out_ids[to] = ids_E[at]
                out_logprobs[to] = requested_logprobs[ask] if has_rule else logprobs_E[at]
                at += 1
                ask += 1
            to += 1
        ask = begin
        while at < stop:
            while ask < end and requested_ids[ask] < ids_E[at]:
                ask += 1
            if ask >= end or requested_ids[ask] != ids_E[at]:
                out_ids[to], out_logprobs[to] = ids_E[at], logprobs_E[at]
                out_inclusion[to] = inclusion_E[at]
                to += 1
            at += 1
        out_N[n] = to - first
        begin = end
    return to
