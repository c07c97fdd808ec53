"""A slice of a micro-batch through the student's body.

Shapes: T tokens of the slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.student.forward.ways import BodyForward, BodyOutput
from pipeline.student.sequence.attention import SequenceAttention

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SlicedForward"]


class SlicedForward(BodyForward):
    """As `BodyForward`, for tokens that are a slice of a row.

    Only attention looks at other tokens, and its exchange knows the whole row.
    """

    def __init__(self, forward: BodyForward, attention: SequenceAttention) -> None:
        """Keep the body's forward, which has no business with boundaries, and the attention."""
        super().__init__(forward.body)
        self._forward = forward
        self._attention = attention

    def __call__(
        self, input_ids_1T: Tensor, position_ids_1T: Tensor, lengths: Sequence[int]
    ) -> BodyOutput:
        """Return the last hidden states of a slice; all processes of the group call it at once.

        Args:
            input_ids_1T: int64, the slice.
            position_ids_1T: int64, the places of its tokens in their sequences.
            lengths: tokens of each sequence of the whole row, padding included.
        """
        self._attention.lengths = tuple(lengths)
        self._forward.way = "positions"  # boundaries are those of the row, not of the slice
        return self._forward(input_ids_1T, position_ids_1T, lengths)
