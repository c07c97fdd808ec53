"""Loss of a chunk of logits, whose gradient takes the logits' place in memory.

The kept entries are taken out of the row; what is left is turned into its own softmax, scaled by
one number per row into the gradient of all the other tokens, and the kept entries' gradients are
put back. So nothing cancels (the tail is summed, never 1 minus the rest), and a row is passed
over four or five times, in cache.

Shapes: N tokens of the chunk, K entries of the fullest one, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.loss.divergence import DivergenceTerms, FDivergence, bucket_terms
from pipeline.loss.sampled import default_share, sampled_terms, sampled_terms_of_weights
from pipeline.loss.settings import Divergence, TailPolicy
from pipeline.loss.types import HeadTargets
from pipeline.loss.weights import known_entries, teacher_weights

__all__ = ["LossSpec", "RowTerms", "join_rows", "sparse_loss_"]

_CPU_BLOCK_BYTES = 3 << 20
"""Rows worked on together on a CPU: few enough to stay in cache over all passes."""


@dataclass(frozen=True, slots=True)
class LossSpec:
    """The numbers that define the loss; `LossSettings` without the ones about memory."""

    temperature: float
    alpha: float
    tail: TailPolicy = "auto"
    divergence: Divergence = "forward_kl"
    control_variate: float | None = None
    """Share of the student's tail in the estimate of the teacher's; None: `default_share`."""
    jsd_beta: float = 0.5
    skew_alpha: float = 0.1
    weights_only: bool = False
    """Of a drawn entry only p / pi is known, at temperature 1 (`SamplingLaw.weights_only`)."""

    def tail_for(self, *, sampled: bool) -> TailPolicy:
        """Return the policy in force: without drawn entries the control variate is the bucket.

        `auto` takes the bucket over sampled entries too where their sum cannot be estimated: for
        the reverse KL, and for all but the forward KL where p itself is not known.
        """
        if self.tail not in ("auto", "control_variate"):
            return self.tail
        if not sampled or (self.tail == "auto" and not self.estimable):
            return "bucket"
        return "control_variate"

    @property
    def estimable(self) -> bool:
        """Whether drawn entries give an unbiased D."""
        if self.weights_only:
            return self.divergence == "forward_kl"
        return self.divergence != "reverse_kl"

    def for_measuring(self, temperature: float) -> LossSpec:
        """Return the forward KL at a temperature, with the least biased policy."""
        return replace(
            self,
            temperature=temperature,
            divergence="forward_kl",
            tail="auto",
            control_variate=None,
        )

    def f_divergence(self) -> FDivergence:
        """Return D with its parameter."""
        skewed = self.divergence.startswith("skew")
        return FDivergence(self.divergence, self.skew_alpha if skewed else self.jsd_beta)


class RowTerms(NamedTuple):
    """What `sparse_loss_` returns for each of N tokens; see `LossTerms` for the meaning."""

    kd_N: Tensor
    ce_N: Tensor
    argmax_N: Tensor | None
    argmax_logprob_N: Tensor | None


def sparse_loss_(
    logits_NV: Tensor,
    targets: HeadTargets,
    spec: LossSpec,
    *,
    gradient: bool = True,
    predictions: bool = False,
) -> RowTerms:
    """Compute the loss of each token and overwrite the logits with its gradient on them.

    The gradient is that of `alpha * T^2 * D(p_T, q_T) + (1 - alpha) * CE`, summed over the rows:
    at T = 1 both parts share one softmax, at T = 2 the second is the square of the first.

    Args:
        logits_NV: float64, float32, bfloat16 or float16; DESTROYED. 16-bit logits are worked on
            in float32, block by block.
        targets: of the same N tokens.
        spec: temperature, alpha, divergence and tail policy.
        gradient: False skips the gradient; the logits are then left in an undefined state.
        predictions: also return the argmax and its log-probability.

    Returns:
        Per-token terms in float32 (float64 for float64 logits), without gradient history.
    """
    rows, vocab_size = logits_NV.shape
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    block = max(rows, 1)
    if logits_NV.device.type == "cpu":
        block = max(1, _CPU_BLOCK_BYTES // (vocab_size * dtype.itemsize))
    parts = []
    for start in range(0, rows, block) if rows else (0,):
        logits_nV = logits_NV[start : start + block]
        work_nV = logits_nV.to(dtype)  # the very same memory when the type already fits
        block_targets = targets.rows(start, start + block)
        parts.append(_block_(work_nV, block_targets, spec, gradient, predictions))
        if gradient and work_nV.dtype != logits_nV.dtype:
            logits_nV.copy_(work_nV)
    return join_rows(parts)


def join_rows(parts: Sequence[RowTerms]) -> RowTerms:
    """Concatenate the terms of consecutive rows; at least one part."""
    kd_N, ce_N, argmax_N, argmax_logprob_N = zip(*parts, strict=True)
    predicted = parts[0].argmax_N is not None
    return RowTerms(
        kd_N=torch.cat(kd_N),
        ce_N=torch.cat(ce_N),
        argmax_N=torch.cat(argmax_N) if predicted else None,
        argmax_logprob_N=torch.cat(argmax_logprob_N) if predicted else None,
    )


def _block_(
    x_NV: Tensor, targets: HeadTargets, spec: LossSpec, gradient: bool, predictions: bool
) -> RowTerms:
    """Do the work for rows that fit the processor's cache; `x_NV` becomes the gradient."""
    temperature, alpha = spec.temperature, spec.alpha
    vocab_size = x_NV.shape[1]
    tail_policy = spec.tail_for(sampled=targets.inclusion_NK is not None)
    known_NK = known_entries(targets, tail=tail_policy, vocab_size=vocab_size)
    ids_NK = targets.ids_NK.masked_fill(~known_NK, 0)
    gold_N1 = targets.gold_N[:, None]
    z_NK = x_NV.gather(1, ids_NK).masked_fill_(~known_NK, -torch.inf)
    z_gold_N = x_NV.gather(1, gold_N1)[:, 0]
    top = x_NV.max(-1) if predictions else None

    # Adding -inf, or 0 at padding, keeps padded entries from hiding the token they point at.
    hide_NK = torch.zeros_like(z_NK).masked_fill_(known_NK, -torch.inf)
    x_NV.scatter_add_(1, ids_NK, hide_NK)
    tail = _exponentials_(x_NV, temperature)

    log_z_1_N = torch.logaddexp(tail.log_sum_1_N, z_NK.logsumexp(-1))
    scaled_NK = z_NK / temperature
    log_z_T_N = torch.logaddexp(tail.log_sum_T_N, scaled_NK.logsumexp(-1))
    kd = _divergence(
        spec, tail_policy, targets, scaled_NK - log_z_T_N[:, None], tail.log_sum_T_N - log_z_T_N,
        known_NK, vocab_size,
    )  # fmt: skip
    if gradient:
        # d(alpha T^2 D)/dz = alpha T dD/d(z/T), and the tail's softmax is exp_T / sum_T.
        kd_N1 = (alpha * temperature * kd.tail_N / tail.sum_T_N)[:, None]
        ce_N1 = ((1 - alpha) * (tail.max_N - log_z_1_N).exp())[:, None]
        _combine_(x_NV, tail.exp_1_NV, temperature, kd_N1, ce_N1)
        kept_NK = kd.kept_NK.mul_(alpha * temperature)
        kept_NK.add_((z_NK - log_z_1_N[:, None]).exp_(), alpha=1 - alpha)
        x_NV.scatter_add_(1, ids_NK, kept_NK)  # kept entries hold 0 by now
        x_NV.scatter_add_(1, gold_N1, torch.full_like(z_gold_N, alpha - 1)[:, None])
    return RowTerms(
        kd_N=kd.value_N,
        ce_N=log_z_1_N - z_gold_N,
        argmax_N=None if top is None else top.indices,
        argmax_logprob_N=None if top is None else top.values - log_z_1_N,
    )


def _divergence(
    spec: LossSpec,
    tail: TailPolicy,
    targets: HeadTargets,
    log_q_NK: Tensor,
    log_q_tail_N: Tensor,
    known_NK: Tensor,
    vocab_size: int,
) -> DivergenceTerms:
    """Return D's value and its gradient on the entries and on the rest."""
    divergence, temperature = spec.f_divergence(), spec.temperature
    if targets.inclusion_NK is not None and tail in ("control_variate", "zero"):
        assert spec.estimable, "refused by pipeline.student.fit"
        if spec.weights_only:
            return sampled_terms_of_weights(
                targets, log_q_NK, log_q_tail_N, known_NK,
                temperature=temperature, vocab_size=vocab_size,
            )  # fmt: skip
        share = spec.control_variate
        if share is None:
            share = default_share(temperature)
        return sampled_terms(
            divergence, targets, log_q_NK, log_q_tail_N, known_NK, temperature=temperature,
            share=0.0 if tail == "zero" else share, vocab_size=vocab_size,
        )  # fmt: skip
    teacher = teacher_weights(
        targets, known_NK, temperature=temperature, tail=tail, vocab_size=vocab_size,
        dtype=log_q_NK.dtype,
    )  # fmt: skip
    return bucket_terms(divergence, teacher, log_q_NK, log_q_tail_N, known_NK)


class _Tail(NamedTuple):
    """Sums over the tokens that are not kept, at temperatures T and 1."""

    max_N: Tensor
    sum_T_N: Tensor
    log_sum_T_N: Tensor
    log_sum_1_N: Tensor
    exp_1_NV: Tensor | None
    """exp(z - max), where it cannot be had from the exponentials at T."""


def _exponentials_(x_NV: Tensor, temperature: float) -> _Tail:
    """Replace logits by exp((z - max) / T) and sum them; hidden tokens give 0."""
    limits = torch.finfo(x_NV.dtype)
    # A row without any token left has max = -inf; a finite one makes its sum 0 instead of NaN.
    max_N1 = x_NV.amax(-1, keepdim=True).clamp_(min=limits.min)
    max_N = max_N1[:, 0]
    x_NV.sub_(max_N1)
    exp_1_NV = None
    if temperature == 1.0:
        sum_T_N = x_NV.exp_().sum(-1)
        sum_1_N = sum_T_N
    elif temperature == 2.0:
        sum_T_N = x_NV.mul_(0.5).exp_().sum(-1)
        sum_1_N = torch.linalg.vector_norm(x_NV, dim=-1).square_()
    else:
        exp_1_NV = x_NV.exp()
        sum_1_N = exp_1_NV.sum(-1)
        sum_T_N = x_NV.mul_(1.0 / temperature).exp_().sum(-1)
    return _Tail(
        max_N=max_N,
        sum_T_N=sum_T_N.clamp(min=limits.tiny),
        log_sum_T_N=(max_N / temperature + sum_T_N.log()).clamp_(min=limits.min),
        log_sum_1_N=max_N + sum_1_N.log(),
        exp_1_NV=exp_1_NV,
    )


def _combine_(
    exp_T_NV: Tensor, exp_1_NV: Tensor | None, temperature: float, kd_N1: Tensor, ce_N1: Tensor
) -> None:
    """Overwrite exp_T by `kd * exp_T + ce * exp_1`, with one factor of each per row."""
    # Plain mul and add: torch's addcmul with per-row factors takes three times as long.
    if temperature == 1.0:
        exp_T_NV.mul_(kd_N1 + ce_N1)
    elif exp_1_NV is None:  # T = 2: exp_1 is the square of exp_T
        exp_T_NV.mul_((exp_T_NV * ce_N1).add_(kd_N1))
    else:
        exp_T_NV.mul_(kd_N1).add_(exp_1_NV.mul_(ce_N1))
