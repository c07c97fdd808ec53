"""Bytes of activations of a forward and backward pass, by arithmetic."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.models.shape import ModelShape
from pipeline.student.settings import StudentSettings
from pipeline.student.train_settings import TrainSettings

__all__ = ["Activations", "activations"]

_OUTSIDE_MLP = 24
"""Numbers kept per token, layer and hidden unit without checkpointing, outside of MLPs."""
_INSIDE_MLP = 6
"""Numbers kept per token, layer and inner unit of an MLP. Together 40 a hidden unit where each has
8/3 inner ones (Llama-like, measured by peak memory at 2,048 tokens; a bound, not a fit)."""
_EXCHANGE = 6
"""Numbers more where heads are exchanged: queries, keys, values and output, before and after."""


class Activations(NamedTuple):
    """Bytes of one process."""

    device: int
    host: int
    """Inputs of checkpointed layers in CPU memory."""


def activations(
    shape: ModelShape, student: StudentSettings, train: TrainSettings, *, tokens: int, element: int
) -> Activations:
    """Estimate the activations of one forward pass of one process.

    Args:
        shape: of the student, pruned.
        student: its checkpointing.
        train: its tiles, slices and offloading.
        tokens: of this process: of its slice, where passes are sliced.
        element: bytes of a number.
    """
    unit = tokens * shape.hidden * element
    layer = unit * (_OUTSIDE_MLP + (_EXCHANGE if train.sequence_parallel_size > 1 else 0))
    inner = _INSIDE_MLP * shape.inner * shape.active_experts * element
    # A tile has about as many tokens as the student has hidden units.
    tile = inner * min(tokens, shape.hidden) if train.tiled_mlp else 0
    layer += 0 if train.tiled_mlp else inner * tokens
    if not student.gradient_checkpointing:
        return Activations(layer * shape.layers + tile, 0)
    # The input of each layer, and all of the one that is being recomputed.
    inputs, layer = unit * shape.layers, layer + tile
    return (
        Activations(layer, inputs) if train.offload_activations else Activations(inputs + layer, 0)
    )
