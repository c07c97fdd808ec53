"""The fused head's input and output, as named tuples: DeepSpeed's hooks search tuples for tensors.

Shapes: N supervised tokens, K entries of the fullest one.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pipeline.loss.spec import LossSpec

__all__ = ["HeadTargets", "LossTerms", "weighted_loss"]


class HeadTargets(NamedTuple):
    """The teacher's sparse targets of N supervised tokens, padded to K entries.

    Token ids within a row are distinct. An id outside the student's vocabulary is allowed: it gets
    no gradient, and its mass is known to be outside the student's vocabulary.
    """

    ids_NK: Tensor
    """int64; arbitrary at padding."""
    logprobs_NK: Tensor
    """float32; log p at temperature 1 over the whole vocabulary; -inf at padding."""
    inclusion_NK: Tensor | None
    """float32 in (0, 1]; probability that the entry was kept, 1 for an always-kept one. None:
    all are always kept (top-k)."""
    log_z_N: Tensor
    """float32; log sum_j p_j^(1/T) over the whole vocabulary, at the loss's temperature."""
    entropy_N: Tensor
    """float32; the teacher's entropy over the whole vocabulary at the loss's temperature, in
    nats."""
    label_N: Tensor
    """int64; the token that follows in the text, inside the student's vocabulary."""
    label_logprob_N: Tensor | None = None
    """float32; the teacher's log p of the label at temperature 1. Only `sampled_reverse_kl` needs
    it."""
    written_logprob_N: Tensor | None = None
    """float32; the same by the model that wrote the text. None: not recorded."""
    weight_N: Tensor | None = None
    """float32, at least 0; what each token's loss and gradient are multiplied by. None: 1."""
    top_k_N: Tensor | None = None
    """bool; targets of a top-k among sampled ones: all that is known of their rest is its mass.
    None: none is."""

    def rows(self, start: int, stop: int) -> HeadTargets:
        """Return the targets of tokens `start` to `stop`, as views."""
        return HeadTargets(
            *(None if part is None else part[start:stop] for part in self)  # type: ignore[arg-type]
        )


class LossTerms(NamedTuple):
    """The loss of N supervised tokens; only `loss` carries a gradient."""

    loss: Tensor
    """Scalar: `alpha * T^2 * sum(divergence) + (1 - alpha) * sum(ce)`, of tokens times their
    weights. A sum; the caller scales it."""
    divergence_N: Tensor
    """Divergence of each token at temperature T, in nats, without the factor T^2."""
    ce_N: Tensor
    """-log q(label) of each token at temperature 1, in nats."""
    argmax_N: Tensor | None = None
    """int64; the student's likeliest token, when predictions were requested."""
    argmax_logprob_N: Tensor | None = None
    """log q(argmax) at temperature 1, when predictions were requested."""
    acceptance_N: Tensor | None = None
    """sum_j min(p_j, q_j) at temperature 1: unbiased of sampled entries, a lower bound of a top-k;
    when predictions were requested of targets at temperature 1."""


def weighted_loss(
    divergence_N: Tensor, ce_N: Tensor, weight_N: Tensor | None, spec: LossSpec
) -> Tensor:
    """Return the scalar loss of tokens, each times its weight; None: 1."""
    if weight_N is not None:
        divergence_N, ce_N = divergence_N * weight_N, ce_N * weight_N
    factor = spec.alpha * spec.temperature**2
    return factor * divergence_N.sum() + (1 - spec.alpha) * ce_N.sum()
