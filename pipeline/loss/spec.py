"""The definition of the loss: temperature, mixture, divergence and tail policy; no tensors.

`LossSettings` is what a user sets; this is what the computation needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.loss.settings import CrossTokenizer, Divergence, TailPolicy

__all__ = ["LossSpec"]


@dataclass(frozen=True, slots=True)
class LossSpec:
    """The numbers that define the loss: `LossSettings` without those about memory."""

    temperature: float
    alpha: float
    tail: TailPolicy = "auto"
    divergence: Divergence = "forward_kl"
    control_variate: float | None = None
    """Weight of the student's tail in the control variate; None: `row_share`."""
    jsd_beta: float = 0.5
    skew_alpha: float = 0.1
    sampled_log_step: float = 0.0
    """Nats; the step to which log p of sampled entries was rounded, with dither. 0: it is exact."""
    rule_highest: float = 0.0
    """Highest temperature that the inclusion rule covers; 0: not known."""

    importance_clip: float | None = None
    """Of `sampled_reverse_kl`: the most that q / q_written counts; None: the ratio is not used."""

    cross_tokenizer: CrossTokenizer = "reject"
    """`uld`: the targets' ids are of another vocabulary, and D is the distance of sorted
    probabilities."""

    def tail_for(self, *, sampled: bool) -> TailPolicy:
        """Return the policy in effect: without sampled entries the control variate is the bucket.

        For the reverse KL, whose sum over the tail cannot be estimated, `auto` is the bucket over
        sampled entries too.
        """
        if self.tail not in ("auto", "control_variate"):
            return self.tail
        if not sampled or (self.tail == "auto" and not self.estimable):
            return "bucket"
        return "control_variate"

    @property
    def estimable(self) -> bool:
        """Whether sampled entries give an unbiased D."""
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
