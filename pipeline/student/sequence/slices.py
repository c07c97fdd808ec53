"""Slices of a flattened micro-batch: equal stretches of its tokens, each with its own targets.

Shapes: T tokens of a micro-batch, P of it with padding, S = P / size of a slice, N supervised
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pipeline.data.collate import Batch

__all__ = ["BatchSlice", "slice_batch", "slice_bounds"]

_BY_TOKEN = (
    "label_ids_N", "ids_NK", "logprobs_NK", "inclusion_NK", "log_z_N", "entropy_N",
    "label_logprob_N", "sample_index_N", "written_logprob_N", "teacher_N", "share_N", "top_k_N",
    "score_N",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BatchSlice:
    """What one process of a group computes of a micro-batch."""

    batch: Batch
    """[1, S] tokens and the targets that their hidden states predict; `sample_ids` and `lengths`
    are those of the whole micro-batch, the padding a sequence at the end: their sum is P."""
    counts: tuple[int, ...]
    """Supervised tokens of each slice of the group, in order; their sum is N."""


def slice_bounds(tokens: int, size: int) -> list[int]:
    """Return where the slices start and where the last one ends, which is at least `tokens`.

    Args:
        tokens: T, at least 1.
        size: number of slices.
    """
    each = -(-tokens // size)
    return [each * part for part in range(size + 1)]


def slice_batch(batch: Batch, *, part: int, size: int) -> BatchSlice:
    """Cut a micro-batch, on the CPU, into slices and return one of them.

    Padding is a sequence of its own at the end, so that no real token sees it, and nothing of it is
    supervised. A supervised token goes with the hidden state that predicts it, which may be in
    another slice than the token itself.

    Args:
        batch: a whole micro-batch.
        part: which slice, from 0.
        size: number of slices.
    """
    tokens = batch.input_ids_1T.shape[1]
    if size == 1:
        return BatchSlice(batch, (batch.num_loss_tokens,))
    bounds = slice_bounds(tokens, size)
    padding = bounds[-1] - tokens
    start, stop = bounds[part], bounds[part + 1]
    # Places ascend, so that the targets of a slice are a stretch and need no copy.
    edges = torch.searchsorted(batch.label_index_N, torch.tensor(bounds)).tolist()
    first, last = edges[part], edges[part + 1]
    targets: dict[str, Any] = {}
    for name in _BY_TOKEN:
        value = getattr(batch, name)
        targets[name] = None if value is None else value[first:last]
    return BatchSlice(
        batch=replace(
            batch,
            input_ids_1T=_padded(batch.input_ids_1T, padding)[:, start:stop],
            position_ids_1T=_padded(batch.position_ids_1T, padding, count=True)[:, start:stop],
            label_index_N=batch.label_index_N[first:last] - start,
            lengths=(*batch.lengths, padding) if padding else batch.lengths,
            **targets,
        ),
        counts=tuple(b - a for a, b in pairwise(edges)),
    )


def _padded(values_1T: Tensor, padding: int, *, count: bool = False) -> Tensor:
    """Append zeros, or 0, 1, 2 and so on: the positions of a sequence."""
    if not padding:
        return values_1T
    more = torch.arange(padding) if count else torch.zeros(padding, dtype=torch.int64)
    return torch.cat([values_1T, more[None].to(values_1T.dtype)], dim=1)
