"""Gradients of sparse targets against the dense one: angle, and norm over the dense gradient's.

Of the student's weights that learn (its body, in one vector), with the mean over the supervised
tokens as the loss; of single steps, and of all steps together. What is drawn falls in the latter
with the number of tokens; a bias stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.bench.yardsticks.measures import angle
from tests.bench.yardsticks.targets import Rule, dense
from tests.bench.yardsticks.training import TeacherRows, head_gradients, states_of

__all__ = ["Compared", "compare_gradients"]


@dataclass(slots=True)
class Compared:
    """One rule's gradients against the dense ones."""

    angles: list[float] = field(default_factory=list)
    """Degrees, of each step."""
    ratios: list[float] = field(default_factory=list)
    angle: float = 0.0
    """Of all steps together."""
    ratio: float = 0.0


def compare_gradients(
    model: Any, teacher: TeacherRows, rules: Mapping[str, Rule], *, per_step: int, steps: int
) -> dict[str, Compared]:
    """Compare the gradients of the first `steps` times `per_step` sequences, in their order."""
    found = {name: Compared() for name in rules}
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        embedding.weight.requires_grad_(False)
    sums: dict[str, Tensor] = {}
    for step in range(steps):
        chosen = list(range(step * per_step, (step + 1) * per_step))
        exact_P = None
        for name, gradient_P in _gradients(model, teacher, {"": dense, **rules}, chosen):
            if exact_P is None:
                exact_P = gradient_P
            else:
                degrees, ratio = _against(gradient_P, exact_P)
                found[name].angles.append(degrees)
                found[name].ratios.append(ratio)
            sums[name] = sums[name].add_(gradient_P) if name in sums else gradient_P.clone()
    for name, result in found.items():
        result.angle, result.ratio = _against(sums[name], sums[""])
    return found


def _gradients(
    model: Any, teacher: TeacherRows, rules: Mapping[str, Rule], chosen: list[int]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each rule's gradient as one vector; the student's forward pass is shared."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    states = [states_of(model, teacher.data, index) for index in chosen]
    head_VD = model.get_output_embeddings().weight
    for name, rule in rules.items():
        on_states, _ = head_gradients(states, head_VD, teacher, chosen, rule)
        parts = torch.autograd.grad(states, parameters, on_states, retain_graph=True)
        yield name, torch.cat([part.flatten() for part in parts])


def _against(found_P: Tensor, exact_P: Tensor) -> tuple[float, float]:
    """Return the angle in degrees and the ratio of norms."""
    norm, exact = float(found_P.double().norm()), float(exact_P.double().norm())
    return angle(float(found_P.double() @ exact_P.double()), norm, exact), norm / exact
