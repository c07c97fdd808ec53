"""What the benches ask of another project: store a teacher's rows, and a gradient from them.

Legend of shapes: R rows, V vocabulary, K entries that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Loss", "Peer", "Stored", "gradient_of", "rows_of", "top_k"]


@dataclass(frozen=True, slots=True)
class Stored:
    """A teacher's rows as a project hands them to its loss."""

    ids_RK: Tensor
    """int64."""
    logprobs_RK: Tensor
    """float32, at T = 1, after the project's own decoding."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else this project's loss needs."""


@dataclass(frozen=True, slots=True)
class Loss:
    """One setting of a project's loss."""

    gradient: Callable[[Stored, Tensor, float], Tensor]
    """From stored rows, the student's logits [R, V] and T: d divergence / d (logits / T), [R, V],
    summed over the rows. A factor T^2, which some have in the loss and some have not, is taken
    out, as it is of the dense gradient."""
    temperatures: tuple[float, ...] = (1.0, 2.0)
    """At which the project has this loss."""


class Peer(Protocol):
    """One setting of what a project stores, with the losses that can follow it."""

    @property
    def name(self) -> str:
        """The row's name; ends in `rebuilt` where none of the project's code runs."""

    @property
    def options(self) -> str:
        """Every option, in the project's own words."""

    @property
    def losses(self) -> Mapping[str, Loss]:
        """By the words that are added to the row's name."""

    @property
    def kept(self) -> float:
        """Entries of a row."""

    @property
    def rebuilds(self) -> bool:
        """Whether log-probs come back changed, so that their error is of interest."""

    def store(self, teacher_RV: Tensor) -> Stored:
        """Store the next rows, given by the teacher's logits (float32), and read them back."""

    def stored_bytes(self) -> int | None:
        """Return the bytes of all rows so far; None where the project stores nothing."""


def rows_of(peers: list[Peer]) -> dict[str, tuple[Peer, Loss]]:
    """Return each peer with each of its losses, by the row's name."""
    return {
        f"{peer.name}, {words}" if words else peer.name: (peer, loss)
        for peer in peers
        for words, loss in peer.losses.items()
    }


def top_k(teacher_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return ids and exact log-probs [R, K] of the teacher's likeliest tokens, in falling order."""
    logprobs_RK, ids_RK = torch.log_softmax(teacher_RV, -1).topk(k, -1)
    return ids_RK, logprobs_RK


def gradient_of(
    divergence: Callable[[Tensor], Tensor], student_RV: Tensor, temperature: float
) -> Tensor:
    """Return d divergence / d (logits / T) of a summed divergence of the logits, by autograd."""
    with torch.enable_grad():
        logits_RV = student_RV.detach().clone().requires_grad_()
        # Some losses change their argument in place, which torch refuses for a leaf.
        (found_RV,) = torch.autograd.grad(divergence(logits_RV * 1.0), logits_RV)
    return found_RV * temperature
