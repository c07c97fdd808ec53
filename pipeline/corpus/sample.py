"""One tokenised sample, and the counts of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["CorpusCounts", "Sample", "SplitName", "WrittenTokens"]

SplitName = Literal["train", "heldout"]


@dataclass(frozen=True, slots=True)
class WrittenTokens:
    """What the model that wrote the supervised tokens of a sample recorded of them."""

    logprobs_N: NDArray[np.float32] | None = None
    """Its log-probs at temperature 1 over its whole vocabulary; None: not recorded."""
    top_ids_NK: NDArray[np.int32] | None = None
    """The ids that it found likeliest at each token, in falling order; None: not recorded."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence of L tokens for the teacher to read."""

    sample_id: str
    """32 hexadecimal digits: a hash of the source, the row's place in it and the part."""
    split: SplitName
    """The same for all parts of one row."""
    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    """loss_mask[i]: token i is supervised. Never at i = 0, which has no context."""
    source_index: int
    """The row's number among the rows read, from 0."""
    part: int
    """0, or the number of the piece of a row that was split."""
    written: WrittenTokens | None = None
    """Of the supervised tokens, where a model wrote them and recorded anything."""


@dataclass(frozen=True, slots=True)
class CorpusCounts:
    """How rows became samples, in counts."""

    rows: int
    """Rows read from the source."""
    samples: int
    train: int
    heldout: int
    tokens: int
    """Tokens of all samples."""
    loss_tokens: int
    """Supervised tokens of all samples."""
    truncated_rows: int
    truncated_tokens: int
    """Tokens that truncation cut off."""
    split_rows: int
    """Rows that became several parts."""
    split_parts: int
    """The parts of those rows."""
    dropped_no_labels: int
    """Samples left out because none of their tokens is supervised."""
    dropped_overlong: int
    """Rows left out because they were longer than `max_length`."""
    quarantined: int
    """Rows left out because they cannot be used: not readable, rejected by the chat template, or
    with content that the template loses."""
