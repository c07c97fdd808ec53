"""The names under which a run logs its distance to the teacher.

A top-k and its tail bucket give a lower bound of the KL over the whole vocabulary, sampled entries
an unbiased estimate of it. The two do not compare, so they have two names.
"""

from __future__ import annotations

from pipeline.loss.settings import LossSettings

__all__ = ["DISTANCES", "divergence_name", "heldout_name", "kl_name"]

DISTANCES = (
    "kl", "kl_bucketed", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl",
    "sampled_reverse_kl", "uld",
)  # fmt: skip
"""All names that the functions below return."""


def kl_name(*, sampled: bool) -> str:
    """Return the name of the KL that targets give: `kl`, or `kl_bucketed` of a top-k.

    Args:
        sampled: whether the cache holds sampled entries.
    """
    return "kl" if sampled else "kl_bucketed"


def heldout_name(loss: LossSettings, *, sampled: bool) -> str:
    """Return the name of the held-out distance: the KL's, or `uld` across tokenizers."""
    return kl_name(sampled=sampled) if loss.cross_tokenizer == "reject" else "uld"


def divergence_name(loss: LossSettings, *, sampled: bool) -> str:
    """Return the name of the divergence that is trained: the KL's, or its own."""
    if loss.cross_tokenizer != "reject":
        return loss.cross_tokenizer
    if loss.divergence != "forward_kl":
        return loss.divergence
    # These two ask nothing of sampled entries' weights: biased as those of a top-k.
    biased = loss.tail in ("bucket", "renormalise")
    return kl_name(sampled=sampled and not biased)
