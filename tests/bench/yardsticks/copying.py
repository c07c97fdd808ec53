"""In-context learning at its plainest: a stretch of tokens twice in a row, the second time copied.

Random tokens cannot be known but from the context, so that what is right on the second copy was
copied (an induction head). Fragments of held-out text are the same with language in it. A loss
that falls elsewhere while this one rises is what Goyal et al. (2509.01649) report of distillation.

Shapes: S sequences, L tokens of a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Copying", "copying_scores", "random_copies", "text_copies"]

START = 0
"""The id before the first copy: the end of a text before."""
_FIRST_ORDINARY = 100
"""Ids below are special tokens and single bytes."""


@dataclass(frozen=True, slots=True)
class Copying:
    """Of each sequence; the first token of a copy, which nothing announces, is left out."""

    accuracy_S: list[float]
    """Share of the second copy's tokens that are the likeliest."""
    gain_S: list[float]
    """Nats by which the mean loss of the second copy is below that of the first."""


def random_copies(count: int, length: int, vocabulary: int) -> NDArray[np.int64]:
    """Return [S, 1 + 2 L] ids: random tokens, each sequence twice; always the same."""
    ids_SL = np.random.default_rng(0).integers(_FIRST_ORDINARY, vocabulary, (count, length))
    return _twice(ids_SL)


def text_copies(count: int, length: int, texts: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
    """Return the same of fragments from the middle of texts that are long enough."""
    long = [text for text in texts if len(text) >= length][:count]
    starts = [(len(text) - length) // 2 for text in long]
    fragments = [t[start : start + length] for t, start in zip(long, starts, strict=True)]
    return _twice(np.stack(fragments).astype(np.int64))


@torch.no_grad()
def copying_scores(model: Any, ids_ST: NDArray[np.int64]) -> Copying:
    """Return accuracy and gain of a model on sequences of two copies."""
    length = ids_ST.shape[1] // 2
    accuracy, gain = [], []
    for ids_T in torch.from_numpy(ids_ST):
        states_TD = model.base_model(ids_T[None], use_cache=False).last_hidden_state[0]
        # Predictions of tokens 2 to L of both copies.
        places = torch.cat([torch.arange(1, length), torch.arange(length + 1, 2 * length)])
        logits_NV = states_TD[places] @ model.get_output_embeddings().weight.t()
        label_N = ids_T[places + 1]
        loss_N = torch.nn.functional.cross_entropy(logits_NV, label_N, reduction="none")
        correct_N = (logits_NV.argmax(-1) == label_N).float()
        accuracy.append(float(correct_N[length - 1 :].mean()))
        gain.append(float(loss_N[: length - 1].mean() - loss_N[length - 1 :].mean()))
    return Copying(accuracy, gain)


def _twice(ids_SL: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.full((len(ids_SL), 1), START), ids_SL, ids_SL], 1)
