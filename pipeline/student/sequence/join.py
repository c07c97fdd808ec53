"""What each slice of a held-out batch scored, joined on every process of the group.

Shapes: N supervised tokens of the whole batch, M those of the fullest slice, G slices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.loss.targets import LossTerms

__all__ = ["join_terms"]


def join_terms(terms: LossTerms, counts: tuple[int, ...], process_group: Any) -> LossTerms:
    """Return the terms of all N tokens, in order; the same on each process of the group.

    Args:
        terms: of this slice, with predictions.
        counts: supervised tokens of each slice.
        process_group: of the slices.
    """
    import torch.distributed as dist

    assert terms.argmax_N is not None
    assert terms.argmax_logprob_N is not None

    def joined(*columns_N: Tensor) -> list[Tensor]:
        rows, width = len(columns_N), max(counts)
        mine = torch.zeros(rows, width, dtype=columns_N[0].dtype, device=columns_N[0].device)
        for row, column_N in enumerate(columns_N):
            mine[row, : len(column_N)] = column_N
        parts = [torch.empty_like(mine) for _ in counts]
        if width:
            dist.all_gather(parts, mine, group=process_group)
        whole = torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], 1)
        return list(whole)

    reals = (terms.divergence_N, terms.ce_N, terms.argmax_logprob_N)
    divergence_N, ce_N, argmax_logprob_N = joined(*(values.double() for values in reals))
    (argmax_N,) = joined(terms.argmax_N)
    acceptance_N = None
    if terms.acceptance_N is not None:
        (acceptance_N,) = joined(terms.acceptance_N.double())
    return LossTerms(terms.loss, divergence_N, ce_N, argmax_N, argmax_logprob_N, acceptance_N)
