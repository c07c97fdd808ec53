"""Compatibility of settings and cache: what the cache's targets cannot serve, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.cache.io.reader import Cache
from pipeline.cache.layout.manifest import Manifest
from pipeline.cache.layout.names import SPLITS
from pipeline.cache.layout.schema import read_spec
from pipeline.data.mixture.caches import caches_of, tags_of
from pipeline.data.settings import DataSettings
from pipeline.errors import ConfigError
from pipeline.loss.settings import LossSettings
from pipeline.sampling.inclusion import InclusionRule

__all__ = [
    "TextKnown",
    "cache_inclusion_rule",
    "cache_sampled_step",
    "check_caches",
    "check_compatibility",
    "heldout_inclusion_rule",
    "sampled_facts",
    "text_known",
]


@dataclass(frozen=True, slots=True)
class TextKnown:
    """What a cache knows of who wrote its text."""

    is_written: bool
    """Whether a model wrote the supervised tokens."""
    logprobs: bool
    """Whether it holds the log-probs with which they were written."""


def text_known(manifest: Manifest) -> TextKnown:
    """Return what the cache knows of its text's writer."""
    return TextKnown(
        "generate" in manifest.identity.get("corpus", {}),
        bool(manifest.codec.get("written_logprobs")),
    )


def cache_inclusion_rule(manifest: Manifest) -> InclusionRule | None:
    """Return the rule that the cache's tail was sampled by; None for top-k."""
    rule = manifest.codec.get("inclusion_rule")
    return InclusionRule(tuple(rule["temperatures"]), tuple(rule["taus"])) if rule else None


def heldout_inclusion_rule(manifest: Manifest) -> InclusionRule | None:
    """Return the rule that the tails of the held-out rows were sampled by; None for top-k."""
    return read_spec(manifest.codec).of_split("heldout").rule


def cache_sampled_step(manifest: Manifest) -> float:
    """Return the step, in nats, that log p of sampled entries was rounded to; 0 without any."""
    return (
        float(manifest.codec["quantisation"]["sampled_step"])
        if manifest.codec.get("inclusion_rule")
        else 0.0
    )


def sampled_facts(cache: Cache) -> tuple[float, float]:
    """Return the rounding step of sampled entries, and the highest temperature of their rules.

    Of training and held-out rows: the head that is trained measures as well. Of a mixture the
    lowest of the highest: any is unbiased (`LossSpec.rule_highest`). 0 and 0 without sampled
    entries.
    """
    specs = [part.spec.of_split(split) for part in caches_of(cache) for split in SPLITS]
    sampled = [(spec, spec.rule) for spec in specs if spec.rule is not None]
    steps = [spec.quantisation.sampled_step for spec, _ in sampled]
    return max(steps, default=0.0), min((rule.highest for _, rule in sampled), default=0.0)


def check_caches(loss: LossSettings, data: DataSettings, cache: Cache) -> None:
    """Reject settings that the targets of a cache, or of any of a mixture, cannot serve.

    Raises:
        ConfigError: with every mistake, those of a mixture's caches with their tags.
    """
    tags = tags_of(cache)
    if data.filter is not None and loss.cross_tokenizer != "reject":
        raise ConfigError(
            mistakes=[
                f"data.filter: found {data.filter} with loss.cross_tokenizer "
                f"{loss.cross_tokenizer}; expected none: all rows are counted in the student's "
                "tokens"
            ]
        )
    if not tags:
        manifest = cache.manifest
        rule = cache_inclusion_rule(manifest)
        text = text_known(manifest)
        check_compatibility(loss, data, grid=manifest.temperatures, rule=rule, text=text)
        return
    mistakes = []
    if loss.cross_tokenizer != "reject":
        mistakes.append(
            f"loss.cross_tokenizer: found {loss.cross_tokenizer} with a mixture of caches; "
            "expected reject: rows are counted in the student's tokens for one cache at a time"
        )
    if data.teachers == "mean" and loss.divergence != "forward_kl" and loss.alpha > 0:
        mistakes.append(
            f"data.teachers: found mean with loss.divergence {loss.divergence}; expected "
            "forward_kl, which alone is linear in the teacher: the mean of the others' losses is "
            "not the loss of the mean teacher"
        )
    parts = caches_of(cache)
    any_sampled = any(part.rule is not None for part in parts)
    for tag, part in zip(tags, parts, strict=True):
        rule = cache_inclusion_rule(part.manifest)
        told = [*_temperature(loss, part.manifest.temperatures, rule)]
        # A control variate is that of the sampled caches; a top-k beside them has its bucket.
        told += [] if any_sampled and rule is None else _tail(loss, rule)
        told += [*_max_entries(data, rule), *_text(loss, text_known(part.manifest))]
        mistakes += [f"{tag}: {line}" for line in told]
    if mistakes:
        raise ConfigError(mistakes=mistakes)


def check_compatibility(
    loss: LossSettings,
    data: DataSettings,
    *,
    grid: Sequence[float],
    rule: InclusionRule | None,
    text: TextKnown | None = None,
) -> None:
    """Reject settings that the cache's targets cannot serve.

    Args:
        loss: of the run.
        data: of the run.
        grid: the cache's temperatures.
        rule: from `cache_inclusion_rule`.
        text: from `cache_text`; None: not known yet, and not checked.

    Raises:
        ConfigError: with every mistake.
    """
    mistakes = [
        *_temperature(loss, grid, rule),
        *_tail(loss, rule),
        *_text(loss, text),
        *_max_entries(data, rule),
    ]
    if mistakes:
        raise ConfigError(mistakes=mistakes)


def _max_entries(data: DataSettings, rule: InclusionRule | None) -> list[str]:
    if rule is None or data.max_entries is None:
        return []
    return [
        f"data.max_entries: found {data.max_entries} with a cache of sampled entries; expected "
        "none: the largest entries of a sample alone are a biased target"
    ]


def _temperature(
    loss: LossSettings, grid: Sequence[float], rule: InclusionRule | None
) -> list[str]:
    # Cross-entropy alone has no temperature.
    if loss.alpha == 0:
        return []
    found = f"loss.temperature: found {loss.temperature:g}; expected "
    between = min(grid) < loss.temperature < max(grid)
    if (
        loss.temperature in grid
        or loss.uncached_temperature == "self_normalised"
        or (between and loss.uncached_temperature == "interpolated")
    ):
        if (
            rule is None
            or loss.tail == "bucket"
            or rule.highest >= min(loss.temperature, max(grid))
        ):
            return []
        return [
            f"{found}at most {rule.highest:g}, the highest temperature that the cache's entries "
            "were sampled for: above, the estimate is unbiased but nearly all noise; choose a "
            "lower one, or loss.tail bucket (biased), or cache the teacher again with a tau for "
            f"{loss.temperature:g}"
        ]
    approximation = "interpolated" if between else "self_normalised"
    return [
        f"{found}one that the cache holds: {_listed(grid)}; choose one of them, or make the cache "
        f"with --capture.temperatures {_listed((*grid, loss.temperature), ',')}, or accept a "
        f"biased normaliser with --loss.uncached_temperature {approximation}"
    ]


def _tail(loss: LossSettings, rule: InclusionRule | None) -> list[str]:
    if rule is None:
        mistakes = []
        top_k = "with a top-k cache, which has no sampled entries; expected"
        if loss.tail == "control_variate":
            mistakes.append(
                f"loss.tail: found control_variate {top_k} auto, bucket, zero or renormalise"
            )
        if loss.control_variate is not None:
            mistakes.append(f"loss.control_variate: found {loss.control_variate:g} {top_k} none")
        return mistakes
    return []


def _text(loss: LossSettings, text: TextKnown | None) -> list[str]:
    if text is None or loss.alpha == 0 or loss.divergence != "sampled_reverse_kl":
        return []
    mistakes = []
    if not text.is_written:
        mistakes.append(
            "loss.divergence: found sampled_reverse_kl with a cache of text that no model wrote; "
            "expected one made with --generate.enabled: its expectation is over written tokens"
        )
    if loss.importance_clip is not None and not text.logprobs:
        mistakes.append(
            f"loss.importance_clip: found {loss.importance_clip:g} with a cache without the "
            "writer's log-probs; expected none, or a cache made with --generate.record_logprobs"
        )
    return mistakes


def _listed(grid: Sequence[float], comma: str = ", ") -> str:
    return comma.join(f"{value:g}" for value in grid)
