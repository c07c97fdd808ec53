"""Columns of a top-k at temperature 1 alone, of engines that tell log-probs and no logits.

Shapes: N rows whose distribution over the next token is wanted, K entries of each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["top_k_columns"]


def top_k_columns(
    label_N: NDArray[np.float32], ids_NK: NDArray[np.int32], logprobs_NK: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return `float32 [N, 4 + 2 K]` as `sparsify` has it.

    The entropy is not to be had: that of the entries and one token for the rest is stored, which is
    never above it. A zero in its place would be a weight of zero for every token (`loss.weight`).

    Args:
        label_N: log p of the token that follows, in nats.
        ids_NK: the likeliest tokens.
        logprobs_NK: theirs, in nats.
    """
    p_NK = np.exp(logprobs_NK.astype(np.float64))
    tail_N = np.clip(1.0 - p_NK.sum(1), 0.0, 1.0)
    log_tail_N = np.log(np.where(tail_N > 0, tail_N, 1.0))
    terms_NK = np.multiply(p_NK, logprobs_NK, out=np.zeros_like(p_NK), where=p_NK > 0)
    entropy_N = -terms_NK.sum(1) - tail_N * log_tail_N
    log_z_N = np.zeros_like(tail_N)  # of the temperature 1
    parts = [
        label_N[:, None], tail_N[:, None], log_z_N[:, None], entropy_N[:, None], ids_NK,
        logprobs_NK,
    ]  # fmt: skip
    columns_NC: NDArray[np.float32] = np.concatenate(parts, axis=1).astype(np.float32)
    return columns_NC
