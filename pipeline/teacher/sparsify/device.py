"""Logits to sparse targets on the device, in rows; the same code behind every engine.

On a CPU loops compiled by numba reduce them (`cpu`), on CUDA Triton kernels (`gpu`), elsewhere
torch.

Legend: R rows (positions), V vocabulary, G temperatures, C columns, K always-kept and D sampled
places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.teacher.sparsify.sparse_scheme import SparseScheme
from pipeline.teacher.sparsify.stopwatch import SPARSIFIER

if TYPE_CHECKING:
    import torch

__all__ = ["SparseScheme", "sparsify"]


def sparsify(
    logits_RV: torch.Tensor,
    label_R: torch.Tensor,
    scheme: SparseScheme,
    noise_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reduce rows of logits to finished columns.

    With p = softmax(z): log Z_T = logsumexp(z/T) - logsumexp(z)/T, which is
    log sum_j p_j^(1/T); the entropy of p_T is logsumexp(z/T) - sum_j p_T,j z_j/T.

    Under an inclusion rule, entries whose exact p asks for it are always kept. Log p of the rest is
    put on its grid with the row's dither, and they are sampled systematically (one offset per row,
    steps of 1 along the running sum of the inclusion probabilities): each is kept with its
    probability, and their number is within one of its mean. The sum runs in integers, so that it
    has no rounding and no order. Were an entry always kept because its ROUNDED p is large, those
    near tau would lose 12 % of their mass: exact where the dither is high, rounded down where it is
    low.

    Args:
        logits_RV: any floating dtype; reduced in float32. Not changed.
        label_R: int64, the token that follows each row.
        scheme: what to keep; its places at most V.
        noise_R: int64 from `noise.row_noise`; needed where the scheme has an inclusion rule.

    Returns:
        float32 [R, C]: label log p; mass outside the always-kept entries; log Z (G); entropy (G);
        ids (K + D, exact in float32 up to 2^24, -1 in an empty place); log p (K + D). The label
        token of a scheme with an inclusion rule is always kept, and not among the entries. NaN
        logits give NaN columns.
    """
    import torch

    rows, device = len(logits_RV), logits_RV.device
    if noise_R is None:
        noise_R = torch.zeros_like(label_R)
    if not rows:
        return logits_RV.new_empty((0, scheme.num_columns), dtype=torch.float32)
    with SPARSIFIER.running(device):
        if device.type == "cuda":
            from pipeline.teacher.sparsify.gpu.choice import sparsify_on_gpu

            return sparsify_on_gpu(logits_RV, label_R, scheme, noise_R)
        if device.type == "cpu":
            from pipeline.teacher.sparsify.cpu.reduce import reduce_on_cpu

            return reduce_on_cpu(logits_RV, label_R, scheme, noise_R)
        from pipeline.teacher.sparsify.gpu.chains import chained_sparsify

        return chained_sparsify(logits_RV, label_R, scheme, noise_R, compiled=False)
