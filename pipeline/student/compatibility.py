"""What a cache's targets allow of the loss: every setting that asks for more, in words."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.cache.layout.manifest import Manifest
from pipeline.data.settings import DataSettings
from pipeline.errors import ConfigError
from pipeline.loss.settings import LossSettings
from pipeline.sampling.inclusion import InclusionRule

__all__ = ["cache_inclusion_rule", "cache_sampled_step", "check_fit"]


def cache_inclusion_rule(manifest: Manifest) -> InclusionRule | None:
    """Return the rule that the cache's tail was sampled by; None for top-k."""
    rule = manifest.codec.get("inclusion_rule")
    return InclusionRule(tuple(rule["temperatures"]), tuple(rule["taus"])) if rule else None


def cache_sampled_step(manifest: Manifest) -> float:
    """Return the step, in nats, that log p of sampled entries was rounded to; 0 without any."""
    return (
        float(manifest.codec["quantisation"]["sampled_step"])
        if manifest.codec.get("inclusion_rule")
        else 0.0
    )


def check_fit(
    loss: LossSettings, data: DataSettings, *, grid: Sequence[float], rule: InclusionRule | None
) -> None:
    """Refuse settings that the cache's targets cannot serve.

    Args:
        loss: of the run.
        data: of the run.
        grid: the cache's temperatures.
        rule: from `cache_inclusion_rule`.

    Raises:
        ConfigError: with every mistake.
    """
    mistakes = [*_temperature(loss, grid, rule), *_tail(loss, rule)]
    if rule is not None and data.max_entries is not None:
        mistakes.append(
            f"data.max_entries: found {data.max_entries} with a cache of sampled entries; expected "
            "none: the largest entries of a sample alone are a biased target"
        )
    if mistakes:
        raise ConfigError(mistakes=mistakes)


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
        or loss.off_grid == "self_normalised"
        or (between and loss.off_grid == "interpolated")
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
        f"biased normaliser with --loss.off_grid {approximation}"
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


def _listed(grid: Sequence[float], comma: str = ", ") -> str:
    return comma.join(f"{value:g}" for value in grid)
