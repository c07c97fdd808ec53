"""Score a student on the held-out rows of a cache: KL, cross-entropy, agreement, calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.collate import Batch
from pipeline.evaluate.measures import METRICS, UNLIKE_METRICS, HeldoutScores

__all__ = ["PartialScores", "merge_scores", "score_batches"]

_BINS = 15


@dataclass
class PartialScores:
    """One rank's sums, by sample id."""

    rows: dict[str, tuple[int, dict[str, float]]] = field(default_factory=dict)
    bins: dict[str, list[tuple[float, float, int]]] = field(default_factory=dict)
    """Confidence, number correct and tokens of each bin, by the first sample id of a batch: added
    up in one order whichever rank had the batch, so that the sums are the same to the last bit."""
    gaps: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """For each bin the sum of confidence minus the number correct, by sample id."""
    with_target: dict[str, int] = field(default_factory=dict)
    """Tokens that have entries, by sample id; filled only across tokenizers."""


def score_batches(
    batches: Iterable[Batch], forward: Callable[[Batch], Any], *, across_tokenizers: bool = False
) -> PartialScores:
    """Run `forward` on each batch and add up per sequence.

    Args:
        batches: held-out rows of this rank.
        forward: returns `LossTerms` with predictions, of the forward KL at temperature 1.
        across_tokenizers: the terms are of ULD; top-1 agreement is not defined.

    Over top-k entries the KL is over the entries and a bucket, a lower bound; over sampled entries
    it is unbiased, and its variance is part of the standard error over sequences.
    """
    scores = PartialScores()
    for batch in batches:
        terms = forward(batch)
        if not batch.num_loss_tokens:
            continue
        argmax_N = terms.argmax_N.cpu()
        distance = "uld" if across_tokenizers else "kl"
        per_token = {
            distance: terms.divergence_N.double().cpu().numpy(),
            "cross_entropy": terms.ce_N.double().cpu().numpy(),
        }
        if not across_tokenizers:
            # The teacher's likeliest token is its largest entry: a top-k always holds it, sampled
            # entries do where any token is always kept.
            best_N = batch.logprobs_NK.argmax(-1, keepdim=True)
            teacher_top_N = batch.ids_NK.gather(-1, best_N).squeeze(-1)
            per_token["top1_agreement"] = (argmax_N == teacher_top_N).double().numpy()
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
        confidence = terms.argmax_logprob_N.double().exp().cpu().numpy()
        right = (argmax_N == batch.label_ids_N).numpy()
        which = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
        bins = []
        for index in range(_BINS):
            inside = which == index
            bins.append(
                (float(confidence[inside].sum()), float(right[inside].sum()), int(inside.sum()))
            )
        scores.bins[batch.sample_ids[0]] = bins
        gaps_SB = np.bincount(
            owner_N * _BINS + which, confidence - right, batch.num_sequences * _BINS
        ).reshape(-1, _BINS)
        scores.gaps |= dict(zip(batch.sample_ids, map(tuple, gaps_SB.tolist()), strict=True))
    return scores


def merge_scores(parts: Iterable[PartialScores]) -> HeldoutScores:
    """Join the ranks' parts, ordered by sample id: the same for any number of ranks."""
    parts = list(parts)
    rows = {name: row for part in parts for name, row in part.rows.items()}
    gaps = {name: row for part in parts for name, row in part.gaps.items()}
    known = {name: count for part in parts for name, count in part.with_target.items()}
    names = sorted(rows)
    by_batch = {name: bins for part in parts for name, bins in part.bins.items()}
    bins = [(0.0, 0.0, 0)] * _BINS
    for name in sorted(by_batch):
        bins = [
            (conf + more, right + hits, count + tokens)
            for (conf, right, count), (more, hits, tokens) in zip(bins, by_batch[name], strict=True)
        ]
    return HeldoutScores(
        sample_ids=tuple(names),
        loss_tokens=tuple(rows[name][0] for name in names),
        sums={
            metric: tuple(rows[name][1][metric] for name in names)
            for metric in (UNLIKE_METRICS if known else METRICS)
        },
        confidence_bins=tuple(bins),
        confidence_gaps=tuple(gaps[name] for name in names),
        with_target=tuple(known[name] for name in names) if known else (),
    )
