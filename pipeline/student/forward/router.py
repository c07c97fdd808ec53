"""The auxiliary loss of a mixture of experts, which keeps its router from preferring a few."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.student.forward.body import text_config

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RouterLoss", "router_loss"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RouterLoss:
    """transformers' loss of a model, and its weight."""

    coefficient: float
    experts: int
    chosen: int
    """Experts that a token goes to."""
    function: Callable[..., Any]
    """`load_balancing_loss_func` of the model's own module."""

    def __call__(self, router_logits: tuple[Tensor, ...]) -> Any:
        """Return coefficient * loss of a micro-batch, a scalar.

        Args:
            router_logits: of each layer of experts, [T, experts].
        """
        return self.coefficient * self.function(router_logits, self.experts, self.chosen)


def router_loss(model: Any, wanted: str, coefficient: float | None) -> RouterLoss | None:
    """Return the loss that is added to the trained one; says so where a model's own is left out.

    Args:
        model: a causal language model; needs no weights.
        wanted: `none` or `config` (`student.router_aux_loss`).
        coefficient: its weight; None: that of the model's config.

    Raises:
        ConfigError: it is asked for, and the model has none or names no weight.
    """
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    config = text_config(model)
    weight = getattr(config, "router_aux_loss_coef", None)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    there = function is not None and experts and chosen
    if wanted == "none":
        if there and weight:
            _log.info(
                "the router's auxiliary loss (weight %g in the student's config) is not part of "
                "the trained loss; --student.router_aux_loss config adds it", weight,
            )  # fmt: skip
        return None
    if not there or function is None or not experts or not chosen:
        raise ConfigError(
            f"student.router_aux_loss: found {wanted} for {type(model).__name__}, for which "
            "transformers has no such loss",
            expected="a mixture of experts that has one",
            do="use --student.router_aux_loss none",
        )
    weight = weight if coefficient is None else coefficient
    if weight is None:
        raise ConfigError(
            "student.router_aux_loss: the student's config names no router_aux_loss_coef",
            expected="a weight",
            do="give one, such as --student.router_aux_coefficient 0.001",
        )
    return RouterLoss(float(weight), int(experts), int(chosen), function)
