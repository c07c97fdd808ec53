"""The [N, K] part between the two passes over the logits, as one function without side effects.

It is apart from the Triton kernels so that it can be compiled, and tested, without Triton.

Shapes: N tokens of the chunk, K entries of the fullest one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.loss.entry_gradient import Entries, EntryTerms, TailSums, entry_terms
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets

__all__ = ["ExpSums", "finish_entries"]


class ExpSums(NamedTuple):
    """Sums over the tokens that are not kept, as the first pass leaves them; float32."""

    max_N: Tensor
    """Largest logit; finite also where there is no such token."""
    sum_T_N: Tensor
    """sum exp((z - max) / T), 0 where there is no such token."""
    sum_1_N: Tensor


def finish_entries(
    entries: Entries,
    sums: ExpSums,
    targets: HeadTargets,
    spec: LossSpec,
    *,
    vocab_size: int,
    gradient: bool,
    dtype: torch.dtype,
) -> EntryTerms:
    """Return loss and factors, and the kept entries' gradient with the label's part, as `dtype`."""
    limits = torch.finfo(torch.float32)
    tail = TailSums(
        max_N=sums.max_N,
        sum_T_N=sums.sum_T_N.clamp(min=limits.tiny),
        log_sum_T_N=(sums.max_N / spec.temperature + sums.sum_T_N.log()).clamp_(min=limits.min),
        log_sum_1_N=sums.max_N + sums.sum_1_N.log(),
    )
    terms = entry_terms(entries, tail, targets, spec, vocab_size=vocab_size, gradient=gradient)
    if terms.kept_NK is None:
        return terms
    # The label's own term is added before rounding, since it nearly cancels for a token that the
    # student predicts well.
    is_label_NK = (entries.ids_NK == targets.label_N[:, None]) & entries.known_NK
    kept_NK = terms.kept_NK.add(is_label_NK, alpha=spec.alpha - 1)
    return terms._replace(kept_NK=kept_NK.to(dtype))
