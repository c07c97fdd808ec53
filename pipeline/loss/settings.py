"""The settings of the distillation loss; imports no torch, so `--help` stays quick."""

from __future__ import annotations

from typing import Literal

from pipeline.config import Settings, option

__all__ = ["Divergence", "LossSettings", "TailPolicy"]

TailPolicy = Literal["bucket", "zero", "renormalise"]
Divergence = Literal["forward_kl"]


class LossSettings(Settings):
    """`alpha * T^2 * D(p_T, q_T) + (1 - alpha) * CE(gold)`, summed over counted tokens."""

    temperature: float = option(
        2.0, "T, which softens teacher and student alike", flag="temperature", gt=0.0
    )
    alpha: float = option(
        0.5, "share of the divergence; the rest is cross-entropy", flag="alpha", ge=0.0, le=1.0
    )
    divergence: Divergence = option("forward_kl", "D, the distance from teacher to student")
    tail: TailPolicy = option(
        "bucket",
        "the teacher's mass outside the kept entries: one extra outcome (bucket), left out (zero;"
        " unbiased for sampled caches, biased for top-k), or spread over the kept ones"
        " (renormalise; biased)",
    )
    chunk_rows: int = option(
        512, "tokens whose logits exist at one time; memory is this times the vocabulary", ge=1
    )
