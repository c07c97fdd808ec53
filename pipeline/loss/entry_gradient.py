"""The loss of a chunk and its gradient on the kept entries: the [N, K] part.

First `take_entries_` reads the kept entries' logits and hides them from the sums. Then the [N, V]
part (`chunk_gradient`, or `chunk_gradient_triton` on a GPU) sums the exponentials of the other
logits. `entry_terms` turns these sums into the loss, the kept entries' gradients, and one factor
per row and temperature by which the exponentials become the gradient of the other tokens.

Shapes: N tokens of the chunk, K entries of the fullest one, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.loss.divergence import DivergenceTerms, FDivergence, bucket_terms
from pipeline.loss.on_policy.written_token import written_token_terms
from pipeline.loss.sampled_divergence import sampled_terms
from pipeline.loss.settings import TailPolicy
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from pipeline.loss.teacher_weights import known_entries, teacher_weights
from pipeline.loss.tokens.acceptance import accepted_mass

__all__ = [
    "Entries",
    "EntryTerms",
    "RowTerms",
    "TailSums",
    "acceptance_of",
    "entry_terms",
    "join_rows",
    "read_entries",
    "take_entries_",
]


class RowTerms(NamedTuple):
    """The result of `sparse_loss_` for each of N tokens; see `LossTerms`."""

    divergence_N: Tensor
    ce_N: Tensor
    argmax_N: Tensor | None
    argmax_logprob_N: Tensor | None
    acceptance_N: Tensor | None = None


def join_rows(parts: Sequence[RowTerms]) -> RowTerms:
    """Concatenate the terms of consecutive rows; at least one part."""
    divergence_N, ce_N, argmax_N, argmax_logprob_N, acceptance_N = zip(*parts, strict=True)
    predicted = parts[0].argmax_N is not None
    accepted = parts[0].acceptance_N is not None
    return RowTerms(
        divergence_N=torch.cat(divergence_N),
        ce_N=torch.cat(ce_N),
        argmax_N=torch.cat(argmax_N) if predicted else None,
        argmax_logprob_N=torch.cat(argmax_logprob_N) if predicted else None,
        acceptance_N=torch.cat(acceptance_N) if accepted else None,
    )


class Entries(NamedTuple):
    """Kept entries, read out of the logits."""

    tail: TailPolicy
    known_NK: Tensor
    ids_NK: Tensor
    """0 where not known."""
    z_NK: Tensor
    """Their logits in the working precision, -inf where not known."""
    z_label_N: Tensor


class TailSums(NamedTuple):
    """Sums over the tokens that are not kept, at temperatures T and 1."""

    max_N: Tensor
    """Largest logit; finite also where there is no such token."""
    sum_T_N: Tensor
    """sum exp((z - max) / T), above 0."""
    log_sum_T_N: Tensor
    """log sum exp(z / T), finite."""
    log_sum_1_N: Tensor


class EntryTerms(NamedTuple):
    """What the [N, V] part still needs: it multiplies, adds, and puts the kept entries back."""

    divergence_N: Tensor
    ce_N: Tensor
    log_z_1_N: Tensor
    kept_NK: Tensor | None
    """Gradient on the kept entries without the label's -(1 - alpha); None without gradient."""
    factor_T_N: Tensor | None
    """Factor of exp((z - max) / T), for each other token."""
    factor_1_N: Tensor | None
    """Factor of exp(z - max), for each other token."""


def take_entries_(
    x_NV: Tensor, targets: HeadTargets, spec: LossSpec, *, dtype: torch.dtype
) -> Entries:
    """Read the kept entries' logits, and set them to -inf in `x_NV`."""
    entries, hide_NK = read_entries(x_NV, targets, spec, dtype=dtype)
    x_NV.scatter_add_(1, entries.ids_NK, hide_NK)
    return entries


def read_entries(
    x_NV: Tensor, targets: HeadTargets, spec: LossSpec, *, dtype: torch.dtype
) -> tuple[Entries, Tensor]:
    """Read the kept entries' logits; also return what added to them hides them, [N, K]."""
    tail = spec.tail_for(sampled=targets.inclusion_NK is not None)
    known_NK = known_entries(targets, tail=tail, vocab_size=x_NV.shape[1])
    ids_NK = targets.ids_NK.masked_fill(~known_NK, 0)
    z_NK = x_NV.gather(1, ids_NK).to(dtype).masked_fill_(~known_NK, -torch.inf)
    z_label_N = x_NV.gather(1, targets.label_N[:, None])[:, 0].to(dtype)
    # Adding -inf, or 0 at padding, keeps padded entries from hiding the token they point at.
    hide_NK = torch.zeros_like(ids_NK, dtype=x_NV.dtype).masked_fill_(known_NK, -torch.inf)
    return Entries(tail, known_NK, ids_NK, z_NK, z_label_N), hide_NK


def entry_terms(
    entries: Entries,
    tail: TailSums,
    targets: HeadTargets,
    spec: LossSpec,
    *,
    vocab_size: int,
    gradient: bool,
) -> EntryTerms:
    """Compute the loss, the gradient on the kept entries, and the factors for the [N, V] part."""
    temperature, alpha, z_NK = spec.temperature, spec.alpha, entries.z_NK
    log_z_1_N = torch.logaddexp(tail.log_sum_1_N, z_NK.logsumexp(-1))
    scaled_NK = z_NK / temperature
    log_z_T_N = torch.logaddexp(tail.log_sum_T_N, scaled_NK.logsumexp(-1))
    divergence = _divergence(
        entries, targets, spec, scaled_NK - log_z_T_N[:, None], tail.log_sum_T_N - log_z_T_N,
        vocab_size,
    )  # fmt: skip
    ce_N = log_z_1_N - entries.z_label_N
    if not gradient:
        return EntryTerms(divergence.value_N, ce_N, log_z_1_N, None, None, None)
    # d(alpha T^2 D)/dz = alpha T dD/d(z/T), and the tail's softmax is exp_T / sum_T.
    kept_NK = divergence.kept_NK.mul_(alpha * temperature)
    kept_NK.add_((z_NK - log_z_1_N[:, None]).exp_(), alpha=1 - alpha)
    return EntryTerms(
        divergence_N=divergence.value_N,
        ce_N=ce_N,
        log_z_1_N=log_z_1_N,
        kept_NK=kept_NK,
        factor_T_N=alpha * temperature * divergence.tail_N / tail.sum_T_N,
        factor_1_N=(1 - alpha) * (tail.max_N - log_z_1_N).exp(),
    )


def acceptance_of(
    entries: Entries, terms: EntryTerms, targets: HeadTargets, spec: LossSpec
) -> Tensor | None:
    """Return `accepted_mass` of each token; None where the targets are at another temperature."""
    if spec.temperature != 1.0:
        return None
    return accepted_mass(
        entries.z_NK - terms.log_z_1_N[:, None], targets, entries.known_NK,
        log_step=spec.sampled_log_step,
    )  # fmt: skip


def _divergence(
    entries: Entries,
    targets: HeadTargets,
    spec: LossSpec,
    log_q_NK: Tensor,
    log_q_tail_N: Tensor,
    vocab_size: int,
) -> DivergenceTerms:
    """Return D's value and its gradient on the entries and on the rest."""
    if spec.divergence == "sampled_reverse_kl":
        return written_token_terms(targets, log_q_NK, log_q_tail_N, spec.importance_clip)
    temperature, tail, known_NK = spec.temperature, entries.tail, entries.known_NK
    if targets.inclusion_NK is not None and tail in ("control_variate", "zero"):
        assert spec.estimable, "pipeline.student.compatibility rejects it"
        return sampled_terms(
            _f_divergence(spec), targets, log_q_NK, log_q_tail_N, known_NK, temperature=temperature,
            share=0.0 if tail == "zero" else spec.control_variate, vocab_size=vocab_size,
            log_step=spec.sampled_log_step, rule_highest=spec.rule_highest,
            bucketed_N=None if tail == "zero" else targets.top_k_N,
        )  # fmt: skip
    teacher = teacher_weights(
        targets, known_NK, temperature=temperature, tail=tail, vocab_size=vocab_size,
        dtype=log_q_NK.dtype,
    )  # fmt: skip
    return bucket_terms(_f_divergence(spec), teacher, log_q_NK, log_q_tail_N, known_NK)


def _f_divergence(spec: LossSpec) -> FDivergence:
    skewed = spec.divergence.startswith("skew")
    return FDivergence(spec.divergence, spec.skew_alpha if skewed else spec.jsd_beta)
