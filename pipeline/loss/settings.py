"""The settings of the distillation loss; imports no torch, so `--help` stays quick."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pipeline.config import Settings, option, rule

__all__ = [
    "CrossTokenizer",
    "Divergence",
    "LossSettings",
    "TailPolicy",
    "TokenWeight",
    "UncachedTemperature",
]

TailPolicy = Literal["auto", "bucket", "control_variate", "zero", "renormalise"]
Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skew_kl",
    "skew_reverse_kl",
    "sampled_reverse_kl",
]
UncachedTemperature = Literal["reject", "interpolated", "self_normalised"]
CrossTokenizer = Literal["reject", "uld"]
TokenWeight = Literal["uniform", "teacher_entropy", "gold_surprise", "student_disagreement"]


class LossSettings(Settings):
    """`alpha * T^2 * D(p_T, q_T) + (1 - alpha) * CE(label)`, summed over supervised tokens."""

    temperature: float = option(
        2.0, "T, which softens teacher and student alike", flag="temperature", gt=0.0
    )
    alpha: float = option(
        0.5, "share of the divergence; the rest is cross-entropy", flag="alpha", ge=0.0, le=1.0
    )
    divergence: Divergence = option(
        "forward_kl",
        "D, the divergence of student q from teacher p: KL(p|q); KL(q|p) (reverse_kl); "
        "jensen_shannon, between the two, see jsd_beta; KL(p | mix) and KL(q | mix) with a mixture "
        "of both (skew_kl, skew_reverse_kl), see skew_alpha; the policy gradient of KL(q|p) from "
        "the written tokens alone (sampled_reverse_kl), for text that the student wrote",
    )
    jsd_beta: float = option(
        0.5, "teacher's share of jensen_shannon's mixture (GKD's beta)", gt=0.0, lt=1.0
    )
    skew_alpha: float = option(
        0.1,
        "share in the mixture of the skew divergences (DistiLLM's alpha): the teacher's in "
        "skew_kl, the student's in skew_reverse_kl",
        gt=0.0,
        lt=1.0,
    )
    importance_clip: float | None = option(
        None,
        "of sampled_reverse_kl: weight each token by the student's probability over the writer's, "
        "at most this (2 is usual); needs a cache with written log-probs (none: no weight)",
        gt=0.0,
    )
    tail: TailPolicy = option(
        "auto",
        "the teacher's mass outside the exactly known entries: one extra outcome (bucket; biased, "
        "without noise); estimated from the sampled entries (zero: plainly; control_variate: with "
        "less noise; both unbiased on a sampled cache, and zero leaves the mass out on a top-k "
        "cache); or spread over the kept ones (renormalise; biased). auto: control_variate where "
        "the cache is sampled, bucket where it is top-k",
    )
    control_variate: float | None = option(
        None,
        "weight of the student's own tail in tail control_variate, from 0 (the same as zero) to 1 "
        "(none: by each row's divergence). It changes the gradient's variance, never its mean",
        ge=0.0,
        le=1.0,
    )
    uncached_temperature: UncachedTemperature = option(
        "reject",
        "a temperature that is not cached: reject it, or approximate its normaliser, "
        "between cached ones (interpolated; biased by a few hundredths) or from the kept "
        "entries alone (self_normalised; biased by the mass that they lack)",
    )
    cross_tokenizer: CrossTokenizer = option(
        "reject",
        "a student with another tokenizer: reject it, or train across tokenizers with the "
        "distance of sorted probabilities (uld, universal logit distillation) where both begin a "
        "token at the same character, at temperature 1, in place of the divergence",
    )
    weight: TokenWeight = option(
        "uniform",
        "how much each supervised token of a step counts, 1 on average over the step: all alike; "
        "by the teacher's entropy there; by its surprise at the text's token, -log p "
        "(gold_surprise); or by how far teacher and student are apart in that token, "
        "|log p - log q| (student_disagreement: one forward pass more). Held-out measures are of "
        "all tokens alike",
    )
    weight_temperature: float = option(
        1.0,
        "the weight is the score to the power of 1 over this: 1 in proportion to it, higher nearer "
        "to uniform",
        gt=0.0,
    )
    weight_quantile: float | None = option(
        None,
        "in place of the power: only this share of a step's tokens counts, those of the highest "
        "scores, all alike",
        gt=0.0,
        le=1.0,
    )
    chunk_rows: int | None = option(
        None,
        "tokens whose logits are in memory at one time; memory is this times the vocabulary (none: "
        "512 on a CPU; on a GPU as many as fit in a 32nd of its memory, at most 4,096)",
        ge=1,
    )
    compile_entries: bool = option(
        True,
        "on a GPU: compile the loss's operations on entries to a few kernels (a minute once); off, "
        "or where compiling fails, a chunk takes about a hundred small ones",
    )

    @rule
    def _divergence_has_a_tail(self) -> Iterator[str]:
        if self.divergence == "reverse_kl" and self.tail not in ("auto", "bucket"):
            yield (
                f"loss.tail: found {self.tail} with loss.divergence reverse_kl, expected auto or "
                "bucket (reverse KL is infinite for a tail without mass, and cannot be estimated)"
            )

    @rule
    def _written_tokens_are_all_there_is(self) -> Iterator[str]:
        if self.divergence != "sampled_reverse_kl":
            if self.importance_clip is not None:
                yield (
                    f"loss.importance_clip: found {self.importance_clip:g} with loss.divergence "
                    f"{self.divergence}, expected none, or loss.divergence sampled_reverse_kl"
                )
            return
        if self.temperature != 1.0:
            yield (
                f"loss.temperature: found {self.temperature:g} with loss.divergence "
                "sampled_reverse_kl, expected 1 (its expectation is over tokens that are drawn at "
                "temperature 1, and of the teacher it knows the written token's log-prob there)"
            )
        if self.tail != "auto":
            yield (
                f"loss.tail: found {self.tail} with loss.divergence sampled_reverse_kl, expected "
                "auto (it uses the written token alone)"
            )
        if self.control_variate is not None:
            yield (
                f"loss.control_variate: found {self.control_variate:g} with loss.divergence "
                "sampled_reverse_kl, expected none (it uses the written token alone)"
            )
        if self.weight in ("gold_surprise", "student_disagreement"):
            yield (
                f"loss.weight: found {self.weight} with loss.divergence sampled_reverse_kl, "
                "expected uniform or teacher_entropy (its expectation is over the written token, "
                "and a weight by that token makes it the gradient of something else)"
            )

    @rule
    def _uld_is_a_divergence_of_its_own(self) -> Iterator[str]:
        if self.cross_tokenizer == "reject":
            return
        for name, found, expected in (
            ("temperature", self.temperature, 1.0),
            ("divergence", self.divergence, "forward_kl"),
            ("tail", self.tail, "auto"),
        ):
            # ULD compares sorted probabilities at T = 1, with the rest as one outcome.
            if found != expected:
                shown = f"{found:g}" if isinstance(found, float) else found
                wanted = f"{expected:g}" if isinstance(expected, float) else expected
                yield (
                    f"loss.{name}: found {shown} with loss.cross_tokenizer "
                    f"{self.cross_tokenizer}, expected {wanted}"
                )

    @rule
    def _weights_are_used(self) -> Iterator[str]:
        quantile = self.weight_quantile is not None
        used = {"weight_quantile": quantile, "weight_temperature": self.weight_temperature != 1.0}
        for name in (name for name, given in used.items() if given and self.weight == "uniform"):
            yield (
                f"loss.{name}: found {getattr(self, name):g} with loss.weight uniform, expected "
                "one of the other weights"
            )
        if self.weight != "uniform" and all(used.values()):
            yield (
                f"loss.weight_temperature: found {self.weight_temperature:g} with "
                "loss.weight_quantile, which takes its place; expected one of them"
            )
        if self.weight != "uniform" and self.cross_tokenizer != "reject":
            yield (
                f"loss.weight: found {self.weight} with loss.cross_tokenizer "
                f"{self.cross_tokenizer}, expected uniform: a student's token may be none of the "
                "teacher's, which then has no score"
            )

    @rule
    def _control_variate_is_used(self) -> Iterator[str]:
        if self.control_variate is not None and self.tail not in ("auto", "control_variate"):
            yield (
                f"loss.control_variate: found {self.control_variate:g} with loss.tail {self.tail}, "
                "expected loss.tail auto or control_variate"
            )
