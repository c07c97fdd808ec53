"""The optimiser's groups of parameters: by weight decay, by learning rate, and for Muon."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipeline.errors import ConfigError
from pipeline.student.settings.train import TrainSettings

__all__ = ["divided_groups"]


def divided_groups(
    groups: Sequence[dict[str, Any]], model: Any, settings: TrainSettings
) -> list[dict[str, Any]]:
    """Divide groups further, by what the settings say of their parameters' names.

    Args:
        groups: of parameters with the same weight decay.
        model: whose parameters they are.
        settings: `learning_rates`, and whether the optimiser is Muon.

    Returns:
        The groups, with `lr` where the settings name one, and with `use_muon` for Muon, which takes
        the matrices of the layers; embeddings, head, biases and norms are left to AdamW.

    Raises:
        ConfigError: a pattern fits no parameter that is trained.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tables = _embeddings(model) if settings.optim == "muon" else frozenset[int]()
    used: set[str] = set()
    divided: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[tuple[Any, ...], dict[str, Any]] = {}
        for parameter in group["params"]:
            more: dict[str, Any] = {}
            pattern = _pattern_of(names[id(parameter)], settings)
            if pattern is not None:
                used.add(pattern)
                more["lr"] = settings.learning_rates[pattern]
            if settings.optim == "muon":
                shape = getattr(parameter, "ds_shape", None) or parameter.shape
                more["use_muon"] = len(shape) == 2 and id(parameter) not in tables
            part = parts.setdefault(tuple(more.items()), {**group, **more, "params": []})
            part["params"].append(parameter)
        divided += parts.values()
    unused = [pattern for pattern in settings.learning_rates if pattern not in used]
    if unused:
        raise ConfigError(
            f"train.learning_rates: {unused[0]!r} fits no parameter that is trained (or an earlier "
            "pattern fits all that it fits)",
            expected="regular expressions of names such as `embed_tokens` or `layers\\.[0-3]\\.`",
        )
    # Stable: without patterns nothing moves. The rate of the first group is the one that is logged.
    return sorted(divided, key=lambda group: "lr" in group)


def _pattern_of(name: str, settings: TrainSettings) -> str | None:
    """Return the first pattern of `learning_rates` that is found in the name."""
    return next((p for p in settings.learning_rates if re.search(p, name)), None)


def _embeddings(model: Any) -> frozenset[int]:
    """Return the ids of tables of tokens: their rows are no directions of one map."""
    from torch import nn

    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    modules += [head for head in (model.get_output_embeddings(),) if head is not None]
    return frozenset(id(module.weight) for module in modules)
