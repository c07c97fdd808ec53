"""Which parameters learn: Spectrum's unfrozen list, or patterns that are frozen."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.config.files import read_config_file
from pipeline.errors import ConfigError
from pipeline.student.forward.reached import branches, unreached_parameters
from pipeline.student.settings.student import StudentSettings

__all__ = [
    "apply_freezing",
    "freeze_unreached",
    "learning_parameters",
    "read_unfrozen_parameters",
]

_log = logging.getLogger(__name__)


def apply_freezing(model: Any, settings: StudentSettings) -> float:
    """Set `requires_grad` of every parameter and return the share of numbers that learn.

    Raises:
        ConfigError: a pattern that matches no parameter, or nothing left to learn.
    """
    learns = learning_parameters(model, settings)
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(name in learns)
    freeze_unreached(model)
    total = sum(_size(parameter) for parameter in named.values())
    trainable = sum(_size(named[name]) for name in learns)
    _log.info(
        "%d of %d parameters learn (%.1f %%), in %d of %d tensors",
        trainable, total, 100 * trainable / total, len(learns), len(named),
    )  # fmt: skip
    return trainable / total


def freeze_unreached(model: Any) -> None:
    """Freeze what no loss on text reaches, and say so: weight decay alone would act on it."""
    unreached = unreached_parameters(model)
    numbers = 0
    for name, parameter in model.named_parameters():
        if name in unreached:
            parameter.requires_grad_(False)
            numbers += _size(parameter)
    if unreached:
        _log.info(
            "%s: %d parameters that text does not reach; they stay as they are",
            ", ".join(branches(model, unreached)), numbers,
        )  # fmt: skip


def learning_parameters(model: Any, settings: StudentSettings) -> set[str]:
    """Return the names of the parameters that learn; needs no weights and changes nothing.

    Raises:
        ConfigError: a pattern that matches no parameter, or nothing left to learn.
    """
    # Tied weights answer to each of their names: Spectrum lists lm_head beside the embedding.
    every = dict(model.named_parameters(remove_duplicate=False))
    if settings.layers_to_unfreeze:
        patterns = read_unfrozen_parameters(settings.layers_to_unfreeze)
        chosen = _matches(every, patterns, settings.layers_to_unfreeze)
    else:
        chosen = _matches(every, settings.freeze, "student.freeze")
    hit = {id(every[name]) for name in chosen}
    unfreeze = bool(settings.layers_to_unfreeze)
    unreached = unreached_parameters(model)
    learns = {
        name
        for name, parameter in model.named_parameters()
        if (id(parameter) in hit) == unfreeze and name not in unreached
    }
    if not learns:
        raise ConfigError(
            "every parameter of the student that text reaches is frozen"
            if unreached
            else "every parameter of the student is frozen",
            expected="at least one that learns",
            do="correct layers_to_unfreeze or student.freeze",
        )
    return learns


def read_unfrozen_parameters(path: str) -> list[str]:
    """Read a Spectrum file: YAML with the list `unfrozen_parameters`.

    Raises:
        ConfigError: unreadable, or without such a list of texts.
    """
    data = read_config_file(path)
    patterns = data.get("unfrozen_parameters")
    if (
        not isinstance(patterns, list)
        or not patterns
        or not all(isinstance(item, str) for item in patterns)
    ):
        raise ConfigError(
            f"layers_to_unfreeze: {Path(path).name} holds {sorted(map(str, data))}",
            expected="a list of texts under `unfrozen_parameters`",
        )
    return patterns


def _matches(named: Iterable[str], patterns: Iterable[str], where: str) -> set[str]:
    names = list(named)
    chosen: set[str] = set()
    useless: list[str] = []
    mistakes: list[str] = []
    for pattern in patterns:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            mistakes.append(f"{where}: {pattern!r} is no regular expression ({error})")
            continue
        # As plain text where it occurs as such: "layers.1." is not meant to match "layers.10.".
        hits = {name for name in names if pattern in name}
        hits = hits or {name for name in names if expression.search(name)}
        if not hits:
            useless.append(pattern)
        chosen |= hits
    if useless:
        mistakes.append(
            f"{where}: {', '.join(map(repr, useless))} match no parameter; expected names such as "
            f"{', '.join(names[1:3])}"
        )
    if mistakes:
        raise ConfigError(mistakes=mistakes)
    return chosen


def _size(parameter: Any) -> int:
    # Under ZeRO 3 a parameter is empty here and remembers its size as ds_numel.
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())
