"""One student of the yardsticks: trained by a rule at the logits, scored densely on held-out rows.

The head is computed chunk by chunk without autograd: the rule gives the gradient on the logits, of
which the gradients on hidden states (and, where it learns, on the head) follow. As in
`tests.bench.quality`: AdamW, a warm-up of a twentieth and a cosine, gradients clipped at 1.

Shapes: N supervised tokens of a sequence, D hidden, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.bench.fidelity_data import Hidden
from tests.bench.quality import LEARNING_RATE
from tests.bench.yardsticks.measures import bins_of
from tests.bench.yardsticks.targets import Rows, Rule

__all__ = [
    "Scored",
    "Select",
    "TeacherRows",
    "head_gradients",
    "heldout_scores",
    "states_of",
    "train",
]

CHUNK = 64
Select = Callable[[Tensor, Tensor, np.random.Generator], Tensor]
"""From the student's and the teacher's entropies [N] of a sequence: rising places to learn from."""


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """Sequences with a teacher's log-probs of all supervised tokens, in memory."""

    data: Hidden
    log_p_NV: Tensor
    entropy_N: Tensor

    @classmethod
    def of(cls, data: Hidden) -> TeacherRows:
        """Compute them from the teacher's hidden states; 200 KB a token."""
        weight_VD = torch.from_numpy(data.weight_VD)
        log_p_NV = torch.empty(len(data.label_N), len(weight_VD))
        for first in range(0, len(log_p_NV), CHUNK):
            some = slice(first, first + CHUNK)
            logits_RV = torch.from_numpy(data.teacher_ND[some]).float() @ weight_VD.t()
            torch.log_softmax(logits_RV, -1, out=log_p_NV[some])
        entropies = [entropy_of(part_RV) for part_RV in log_p_NV.split(CHUNK)]
        return cls(data, log_p_NV, torch.cat(entropies))

    @classmethod
    def none(cls, data: Hidden) -> TeacherRows:
        """Return the sequences for `cross_entropy`, which asks no teacher: zeros, in no memory."""
        tokens = len(data.label_N)
        return cls(
            data, torch.zeros(1, len(data.weight_VD)).expand(tokens, -1), torch.zeros(tokens)
        )

    def tokens(self, index: int) -> slice:
        """Return the supervised tokens of a sequence."""
        ends = np.cumsum([0, *self.data.counts_S])
        return slice(int(ends[index]), int(ends[index + 1]))


def entropy_of(log_p_RV: Tensor) -> Tensor:
    """Return the entropy [R] in nats."""
    return -(log_p_RV.exp() * log_p_RV).sum(-1)


def states_of(model: Any, data: Hidden, index: int) -> Tensor:
    """Return the hidden states [N, D] that predict a sequence's supervised tokens."""
    ids_1L = torch.from_numpy(data.input_ids[index].astype(np.int64))[None]
    rows_N = torch.from_numpy(np.flatnonzero(data.loss_mask[index]) - 1)
    states: Tensor = model.base_model(ids_1L, use_cache=False).last_hidden_state
    return states[0].index_select(0, rows_N)


@torch.no_grad()
def head_gradients(
    states: Sequence[Tensor],
    head_VD: Tensor,
    teacher: TeacherRows,
    chosen: Sequence[int],
    rule: Rule,
    select: Select | None = None,
    generator: np.random.Generator | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """Return the mean loss's gradients on hidden states [N, D] of sequences, and on the head.

    The latter is None where the head does not learn. The mean is over the tokens selected.
    """
    gradients = [torch.zeros_like(part_ND) for part_ND in states]
    head_gradient_VD = torch.zeros_like(head_VD) if head_VD.requires_grad else None
    total = 0
    for index, states_ND, gradient_ND in zip(chosen, states, gradients, strict=True):
        first = teacher.tokens(index).start
        places_N = torch.arange(len(states_ND))
        if select is not None and generator is not None:
            q = [torch.log_softmax(s_RD @ head_VD.t(), -1) for s_RD in states_ND.split(CHUNK)]
            entropy_N = torch.cat([entropy_of(part_RV) for part_RV in q])
            places_N = select(entropy_N, teacher.entropy_N[teacher.tokens(index)], generator)
        total += len(places_N)
        for places_R in places_N.split(CHUNK):
            states_RD = states_ND[places_R]
            tokens_R = first + places_R.numpy()
            label_R = torch.from_numpy(teacher.data.label_N[tokens_R])
            log_p_RV = teacher.log_p_NV[torch.from_numpy(tokens_R)]
            gradient_RV = rule(Rows(log_p_RV, states_RD @ head_VD.t(), label_R, tokens_R))
            gradient_ND[places_R] = gradient_RV @ head_VD
            if head_gradient_VD is not None:
                head_gradient_VD.addmm_(gradient_RV.t(), states_RD)
    if head_gradient_VD is not None:
        head_gradient_VD /= total
    return [gradient_ND / total for gradient_ND in gradients], head_gradient_VD


def train(
    model: Any,
    teacher: TeacherRows,
    rule: Rule,
    *,
    seed: int,
    per_step: int,
    select: Select | None = None,
    learn_head: bool = False,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Train a model in place on every sequence once, in an order that the seed alone decides."""
    head_VD = model.get_output_embeddings().weight
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        embedding.weight.requires_grad_(learn_head)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, fused=True)
    model.train()
    generator = np.random.default_rng((seed, 1))  # of random positions, not of the order
    for rate, chosen in _steps(len(teacher.data.input_ids), per_step, seed):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * rate
        states = [states_of(model, teacher.data, index) for index in chosen]
        gradients, head_gradient_VD = head_gradients(
            states, head_VD, teacher, chosen, rule, select, generator
        )
        torch.autograd.backward(states, gradients)
        if head_gradient_VD is not None:
            tied = head_VD.grad  # has the embedding's part already where the two are one
            head_VD.grad = head_gradient_VD if tied is None else tied.add_(head_gradient_VD)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


def _steps(sequences: int, per_step: int, seed: int) -> Iterator[tuple[float, list[int]]]:
    """Yield each step's share of the learning rate and its sequences."""
    order = np.random.default_rng(seed).permutation(sequences)
    steps = sequences // per_step
    for step in range(steps):
        rate = min(1.0, (step + 1) / max(1, steps // 20))
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
        yield rate, order[step * per_step : (step + 1) * per_step].tolist()


@dataclass(frozen=True, slots=True)
class Scored:
    """Of each held-out sequence: means over its tokens in nats, and bins of its confidence."""

    kl: list[float]
    loss: list[float]
    bins: list[list[list[float]]]


@torch.no_grad()
def heldout_scores(model: Any, teacher: TeacherRows) -> Scored:
    """Score a model on every sequence: KL to the teacher, loss of the text, calibration."""
    found = Scored([], [], [])
    head_VD = model.get_output_embeddings().weight
    for index in range(len(teacher.data.input_ids)):
        tokens = teacher.tokens(index)
        parts = []
        label_N = torch.from_numpy(teacher.data.label_N[tokens])
        chunks = zip(
            states_of(model, teacher.data, index).split(CHUNK),
            teacher.log_p_NV[tokens].split(CHUNK),
            label_N.split(CHUNK),
            strict=True,
        )
        for states_RD, log_p_RV, label_R in chunks:
            log_q_RV = torch.log_softmax(states_RD @ head_VD.t(), -1)
            kl_R = (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(-1)
            loss_R = -log_q_RV.gather(1, label_R[:, None])[:, 0]
            top = log_q_RV.max(-1)
            parts.append(torch.stack([kl_R, loss_R, top.values.exp(), top.indices == label_R]))
        kl_N, loss_N, confidence_N, correct_N = torch.cat(parts, 1).double().numpy()
        found.kl.append(float(kl_N.mean()))
        found.loss.append(float(loss_N.mean()))
        found.bins.append(bins_of(confidence_N, correct_N > 0).tolist())
    return found
