"""Score a student on the held-out rows of a cache: KL, cross-entropy, agreement, calibration.

Shapes: N supervised tokens and S sequences of a batch, or S sequences of all; B bins of confidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.collate import Batch
from pipeline.evaluate.measures import METRICS, UNLIKE_METRICS, HeldoutScores

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PartialScores", "merge_scores", "score_batches"]

_BINS = 15
_BOUNDS = ("kl", "acceptance")


@dataclass
class PartialScores:
    """One rank's sums, by sample id."""

    rows: dict[str, tuple[int, dict[str, float]]] = field(default_factory=dict)
    bins: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Confidence, number correct and tokens of each bin, [B, 3], by sample id."""
    with_target: dict[str, int] = field(default_factory=dict)
    """Tokens that have entries, by sample id; filled only across tokenizers."""
    has_top_k: bool = False
    """Whether any target was of a top-k, over which KL and acceptance are lower bounds."""


def score_batches(
    batches: Iterable[Batch], forward: Callable[[Batch], Any], *, across_tokenizers: bool = False
) -> PartialScores:
    """Run `forward` on each batch and add up per sequence.

    Args:
        batches: held-out rows of this rank.
        forward: returns `LossTerms` with predictions, of the forward KL at temperature 1.
        across_tokenizers: the terms are of ULD; top-1 agreement is not defined.

    Over top-k entries the KL is over the entries and a bucket, a lower bound; over sampled entries
    it is unbiased, and its variance is part of the standard error over sequences. Where the batches
    carry the log-probs with which the text was written, `written_drift` is their mean excess over
    the student's: where tokens were drawn at temperature 1 with no filter an unbiased estimate of
    KL(q_written || q_now) a token over the contexts that the writer reaches, 0 for the writer
    itself; drawn otherwise a difference of two log-likelihoods of that text, which can be below 0.
    """
    scores = PartialScores()
    for batch in batches:
        terms = forward(batch)
        if not batch.num_loss_tokens:
            continue
        argmax_N = terms.argmax_N.cpu()
        distance = "uld" if across_tokenizers else "kl"
        scores.has_top_k |= batch.inclusion_NK is None or batch.top_k_N is not None
        per_token = {
            distance: terms.divergence_N.double().cpu().numpy(),
            "cross_entropy": terms.ce_N.double().cpu().numpy(),
        }
        if not across_tokenizers:
            per_token["top1_agreement"] = (argmax_N == _teacher_top(batch)).double().numpy()
            if terms.acceptance_N is not None:
                per_token["acceptance"] = terms.acceptance_N.double().cpu().numpy()
        if batch.written_logprob_N is not None:
            written_N = batch.written_logprob_N.double().cpu().numpy()
            per_token["written_drift"] = written_N + per_token["cross_entropy"]
        owner_N = batch.sample_index_N.numpy()
        counts = np.bincount(owner_N, minlength=batch.num_sequences)
        sums = {
            name: np.bincount(owner_N, weights=values, minlength=batch.num_sequences)
            for name, values in per_token.items()
        }
        for index in range(batch.num_sequences):
            scores.rows[batch.sample_ids[index]] = (
                int(counts[index]),
                {name: float(sums[name][index]) for name in per_token},
            )
        if across_tokenizers:
            there_N = np.isfinite(batch.logprobs_NK.numpy()).any(-1)
            known = np.bincount(owner_N, weights=there_N, minlength=batch.num_sequences)
            scores.with_target |= dict(
                zip(batch.sample_ids, known.astype(int).tolist(), strict=True)
            )
        confidence_N = terms.argmax_logprob_N.double().exp().cpu().numpy()
        right_N = (argmax_N == batch.label_ids_N).numpy()
        bin_N = np.minimum((confidence_N * _BINS).astype(int), _BINS - 1)
        bins_SB3 = np.stack(
            [
                np.bincount(owner_N * _BINS + bin_N, values_N, batch.num_sequences * _BINS)
                for values_N in (confidence_N, right_N, None)
            ],
            axis=-1,
        ).reshape(-1, _BINS, 3)
        scores.bins |= dict(zip(batch.sample_ids, bins_SB3, strict=True))
    return scores


def _teacher_top(batch: Batch) -> Tensor:
    """Return the teacher's likeliest token of each position, int64 [N].

    Where the cache does not know it, the first of the largest entries as they are stored, which
    its quantisation can have made equal.
    """
    if batch.largest_N is not None:
        return batch.largest_N
    best_N1 = batch.logprobs_NK.argmax(-1, keepdim=True)
    return batch.ids_NK.gather(-1, best_N1).squeeze(-1)


def merge_scores(parts: Iterable[PartialScores]) -> HeldoutScores:
    """Join the ranks' parts, ordered by sample id: the same for any number of ranks."""
    parts = list(parts)
    rows = {name: row for part in parts for name, row in part.rows.items()}
    bins = {name: bins_B3 for part in parts for name, bins_B3 in part.bins.items()}
    known = {name: count for part in parts for name, count in part.with_target.items()}
    names = sorted(rows)
    metrics: tuple[str, ...] = UNLIKE_METRICS if known else METRICS
    if names:
        there = set.intersection(*({*sums} for _, sums in rows.values()))
        metrics = tuple(name for name in (*metrics, "written_drift") if name in there)
    bins_SB3 = np.array([bins[name] for name in names]).reshape(-1, _BINS, 3)
    return HeldoutScores(
        sample_ids=tuple(names),
        loss_tokens=tuple(rows[name][0] for name in names),
        sums={metric: tuple(rows[name][1][metric] for name in names) for metric in metrics},
        confidence_bins=tuple(
            (confidence, right, int(count)) for confidence, right, count in bins_SB3.sum(0).tolist()
        ),
        confidence_gaps=tuple(map(tuple, (bins_SB3[..., 0] - bins_SB3[..., 1]).tolist())),
        with_target=tuple(known[name] for name in names) if known else (),
        bounds=tuple(name for name in metrics if name in _BOUNDS)
        if any(part.has_top_k for part in parts)
        else (),
    )
