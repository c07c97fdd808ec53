"""Logits to sparse targets on the device, in rows; the same code behind every engine.

Legend: R rows (positions), V vocabulary, K kept entries, G temperatures, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.sparse import SparseTargets
from pipeline.errors import ModelError

if TYPE_CHECKING:
    import torch

__all__ = ["SparseScheme", "sparsify", "to_targets"]


@dataclass(frozen=True, slots=True)
class SparseScheme:
    """Top-k with exact tail mass, and exact normalisers on a grid of temperatures."""

    top_k: int
    temperatures: tuple[float, ...]

    def to_json(self) -> dict[str, object]:
        """Return the part of the cache's identity that this scheme makes."""
        return {"name": "top-k", "top_k": self.top_k, "temperatures": list(self.temperatures)}

    @property
    def num_columns(self) -> int:
        """C: gold, tail, log Z and entropy per temperature, ids, log-probs."""
        return 2 + 2 * len(self.temperatures) + 2 * self.top_k


def sparsify(logits_RV: torch.Tensor, gold_R: torch.Tensor, scheme: SparseScheme) -> torch.Tensor:
    """Reduce rows of logits to finished columns.

    With p = softmax(z): log Z_T = logsumexp(z/T) - logsumexp(z)/T, which is
    log sum_j p_j^(1/T); the entropy of p_T is logsumexp(z/T) - sum_j p_T,j z_j/T.

    Args:
        logits_RV: any floating dtype; reduced in float32. Not changed.
        gold_R: int64, the token that follows each row.
        scheme: what to keep; `top_k` at most V.

    Returns:
        float32 [R, C]: gold log p, tail mass, log Z (G), entropy (G), ids (K, exact in float32
        up to 2^24), log p (K). NaN logits give NaN columns, which `to_targets` refuses.
    """
    import torch

    if len(logits_RV) == 1:
        # Torch sums a lone row in as many parts as there are threads, and two rows one by one.
        return sparsify(logits_RV.expand(2, -1), gold_R.expand(2), scheme)[:1]
    # From the largest on: else sum p z / T loses about (z / T)^2 / 2^24 nats to rounding.
    z_RV = logits_RV.float()
    z_RV = z_RV - z_RV.amax(-1, keepdim=True)
    log_z_R1 = torch.logsumexp(z_RV, -1, keepdim=True)
    top_RK, ids_RK = torch.topk(z_RV, scheme.top_k, dim=-1)
    logprobs_RK = top_RK - log_z_R1
    gold_R1 = z_RV.gather(-1, gold_R.unsqueeze(-1)) - log_z_R1
    tail_R1 = (1.0 - logprobs_RK.exp().sum(-1, keepdim=True)).clamp_(0.0, 1.0)
    normalisers: list[torch.Tensor] = []
    entropies: list[torch.Tensor] = []
    for temperature in scheme.temperatures:
        scaled_RV = z_RV if temperature == 1.0 else z_RV / temperature
        lse_R1 = log_z_R1 if temperature == 1.0 else torch.logsumexp(scaled_RV, -1, keepdim=True)
        mean_R1 = ((scaled_RV - lse_R1).exp_().mul_(scaled_RV)).sum(-1, keepdim=True)
        normalisers.append(lse_R1 - log_z_R1 / temperature)
        entropies.append(lse_R1 - mean_R1)
    return torch.cat(
        [gold_R1, tail_R1, *normalisers, *entropies, ids_RK.to(torch.float32), logprobs_RK], dim=-1
    )


def to_targets(
    columns_NC: NDArray[np.float32], scheme: SparseScheme, *, sample_id: str
) -> tuple[SparseTargets, NDArray[np.float32]]:
    """Turn one sequence's columns into targets and the tail mass of each position.

    Raises:
        ModelError: the teacher produced NaN or infinite logits; named by sample and position.
    """
    finite_N = np.isfinite(columns_NC).all(axis=1)
    if not finite_N.all():
        where = int(np.flatnonzero(~finite_N)[0])
        raise ModelError(
            f"the teacher's logits of sample {sample_id}, counted position {where}, are not finite",
            expected="finite logits",
            do="run the teacher in bfloat16 or float32 (float16 overflows), or drop the sample",
        )
    grid, top_k = len(scheme.temperatures), scheme.top_k
    start = 2 + 2 * grid
    ids_NK = columns_NC[:, start : start + top_k].astype(np.int32)
    logprobs_NK = columns_NC[:, start + top_k :]
    order_NK = np.argsort(ids_NK, axis=1, kind="stable")
    targets = SparseTargets(
        counts_N=np.full(columns_NC.shape[0], top_k, np.int32),
        token_ids_E=np.take_along_axis(ids_NK, order_NK, axis=1).reshape(-1),
        logprobs_E=np.minimum(np.take_along_axis(logprobs_NK, order_NK, axis=1), 0).reshape(-1),
        inclusion_E=None,
        temperatures=scheme.temperatures,
        log_z_NG=columns_NC[:, 2 : 2 + grid],
        entropy_NG=np.maximum(columns_NC[:, 2 + grid : start], 0),
        gold_logprob_N=columns_NC[:, 0],
    )
    return targets, columns_NC[:, 1]
