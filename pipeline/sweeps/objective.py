"""The objective of a sweep by the name under which its runs log it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.errors import ConfigError
from pipeline.loss.settings import LossSettings
from pipeline.student.metric_names import DISTANCES, divergence_name, heldout_name
from pipeline.sweeps.space import Point

__all__ = ["logged_objective", "unmeasured"]


def logged_objective(objective: str, points: Sequence[Point], *, sampled: bool) -> str:
    """Return the objective as every run logs it: the KL over a top-k is `kl_bucketed`.

    Args:
        objective: of the sweep file.
        points: of a grid or list, or the corners of a search.
        sampled: whether the cache holds sampled entries.

    Raises:
        ConfigError: a run that measures another distance, whose values do not compare.
    """
    part, _, name = objective.partition("/")
    if name not in DISTANCES or part not in ("heldout", "train"):
        return objective
    name_of = heldout_name if part == "heldout" else divergence_name
    logged = {point.label: name_of(_loss(point), sampled=sampled) for point in points}
    if name == "kl" and set(logged.values()) == {"kl_bucketed"}:
        return f"{part}/kl_bucketed"
    mistakes = [
        f"{label}: found {part}/{other}, expected the objective of the sweep, {objective}: "
        "different distances do not compare"
        for label, other in logged.items()
        if other != name
    ]
    if mistakes:
        raise ConfigError(mistakes=mistakes)
    return objective


def unmeasured(objective: str, points: Sequence[Point]) -> list[str]:
    """Return a mistake for each point whose run never measures the objective.

    Args:
        objective: of the sweep file.
        points: of a grid or list, or the corners of a search.
    """
    if not objective.startswith("heldout/"):
        return []
    settings: list[tuple[str, Any]] = [(point.label, point.settings) for point in points]
    return [
        f"{label}: found train.evaluate never with the objective {objective}, which is measured on "
        "held-out rows; expected train.evaluate end, or an objective of the training such as "
        "train/loss"
        for label, run in settings
        if run.train.evaluate == "never"
    ]


def _loss(point: Point) -> LossSettings:
    settings: Any = point.settings
    loss: LossSettings = settings.loss
    return loss
