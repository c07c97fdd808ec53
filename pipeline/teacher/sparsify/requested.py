"""Log-probs of tokens that are asked for by id: a gather beside the reduction of the logits.

The reduction has found the label's log-prob, which needs the normaliser over the whole vocabulary;
any other token's is that plus the difference of two logits. So nothing of the reduction changes,
and nothing is read but K logits a row. At another temperature of the grid the entry's log p follows
from log Z as any other entry's does.

Legend: R rows (positions), V vocabulary, C columns of the scheme, K requested ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.targets import RequestedEntries

if TYPE_CHECKING:
    import torch

__all__ = ["requested_entries", "with_requested"]

_NO_TOKEN = 1.0
"""In the place of a log p: there is no such token. A log p is above 0 by its rounding at most."""
_LOWEST = -64.0
"""Nats; below the lowest code of a shard. A teacher may rule a token out by a very low logit."""


def with_requested(
    columns_RC: torch.Tensor,
    logits_RV: torch.Tensor,
    label_R: torch.Tensor,
    ids_RK: torch.Tensor,
) -> torch.Tensor:
    """Append the log-probs of requested ids to finished columns.

    Args:
        columns_RC: from `sparsify`, of the same rows.
        logits_RV: any floating dtype. Not changed.
        label_R: int64, the token that follows each row.
        ids_RK: int64; below 0 or not in the vocabulary: no token.

    Returns:
        float32 [R, C + K]; `requested_entries` reads the last K. NaN logits give NaN columns.
    """
    import torch

    there_RK = (ids_RK >= 0) & (ids_RK < logits_RV.shape[1])
    z_RK = logits_RV.gather(-1, ids_RK.where(there_RK, 0)).float()
    label_R1 = logits_RV.gather(-1, label_R[:, None]).float()
    values_RK = (z_RK - label_R1 + columns_RC[:, :1]).clamp(min=_LOWEST)
    return torch.cat([columns_RC, values_RK.where(there_RK, _NO_TOKEN)], dim=-1)


def requested_entries(
    ids_NK: NDArray[np.integer[Any]], columns_NK: NDArray[np.float32]
) -> RequestedEntries:
    """Return the entries of one sequence.

    Args:
        ids_NK: what was asked for.
        columns_NK: the last K columns of `with_requested`.
    """
    if not len(ids_NK):
        none = np.zeros(0, np.int32)
        return RequestedEntries(none, none, none.astype(np.float32))
    there_NK = columns_NK < _NO_TOKEN / 2
    return RequestedEntries(
        there_NK.sum(axis=1).astype(np.int32),
        ids_NK[there_NK].astype(np.int32),
        np.minimum(columns_NK[there_NK], 0).astype(np.float32),
    )
