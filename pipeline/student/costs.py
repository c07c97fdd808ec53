"""What a training step needs of a device, by arithmetic over the student's shape and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.loss.gpu.chunks import chunk_layout
from pipeline.loss.settings import LossSettings
from pipeline.models.shape import ModelShape
from pipeline.models.windows import attended_pairs
from pipeline.student.settings.student import StudentSettings
from pipeline.student.settings.train import TrainSettings

__all__ = [
    "Activations", "TrainingMemory", "activations", "model_flops", "training_flops",
    "training_memory",
]  # fmt: skip

_BASE_BYTES = 1 << 30
"""Interpreter, torch and, on a GPU, its context."""
_OUTSIDE_MLP = 24
"""Numbers kept per token, layer and hidden unit without checkpointing, outside of MLPs."""
_INSIDE_MLP = 6
"""Numbers kept per token, layer and inner unit of an MLP. Together 40 a hidden unit where each has
8/3 inner ones (Llama-like, measured by peak memory at 2,048 tokens; a bound, not a fit)."""
_EXCHANGE = 6
"""Numbers more where heads are exchanged: queries, keys, values and output, before and after."""
_ADAPTER_SHARE = 1 / 16
"""Adapters hold up to this share of the weights."""


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of one process, by what they are for."""

    state: int
    """Weights, gradients, and the optimiser's state where it is not offloaded."""
    activations: int
    head: int
    """Logits and their gradient of one chunk; on a GPU also the sum of the head's gradient."""
    offloaded: int = 0
    """What is in CPU memory instead: the optimiser's state, the weights, inputs of layers."""

    @property
    def device(self) -> int:
        """All that is on the device."""
        return _BASE_BYTES + self.state + self.activations + self.head


def training_memory(
    shape: ModelShape,
    student: StudentSettings,
    train: TrainSettings,
    loss: LossSettings,
    *,
    tokens: int,
    world_size: int,
    dtype: str,
    device_bytes: int | None = None,
) -> TrainingMemory:
    """Estimate the memory of one process.

    Args:
        shape: of the student, pruned.
        student: its adapters and checkpointing.
        train: its ZeRO stage and offloading.
        loss: rows of a chunk.
        tokens: of one forward pass, or of this process's slice of it.
        world_size: processes that ZeRO divides the state among.
        dtype: `float32`, `bfloat16` or `float16`.
        device_bytes: memory of the GPU; None on a CPU.
    """
    element = 4 if dtype == "float32" else 2
    kept = activations(shape, student, train, tokens=tokens, element=element)
    frozen, learning = 0.0, float(shape.parameters)
    if student.lora.enabled:
        frozen, learning = learning, learning * _ADAPTER_SHARE
    elif shape.vision and any("vision" in pattern for pattern in student.freeze):
        frozen, learning = float(shape.vision), learning - shape.vision
    optimizer = learning * _optimizer_bytes(train.optim, dtype)
    weights, gradients = (frozen + learning) * element, learning * element
    stage = train.stage(dtype=dtype, world_size=world_size)
    if stage >= 1:
        optimizer /= world_size
    if stage >= 2:
        gradients /= world_size
    if stage >= 3:
        weights /= world_size
    if train.accumulates_float32(dtype=dtype):
        # Beside those of one pass under stage 1, instead of them where they are divided.
        gradients = gradients * 3 if stage == 1 else gradients * 2
    average = 0.0 if train.ema_decay is None else 4 * learning / world_size
    offloaded = (optimizer if train.offload_optimizer else 0.0) + (
        weights if train.offload_parameters else 0.0
    )
    return TrainingMemory(
        state=int(weights + gradients + optimizer + average - offloaded),
        activations=kept.device,
        head=_head(shape, student, loss, element=element, device_bytes=device_bytes),
        offloaded=kept.host + (0 if train.offload_folder is not None else int(offloaded)),
    )


def _optimizer_bytes(optim: str, dtype: str) -> int:
    """Return the bytes for each weight: moments, and float32 masters where weights have 16 bits."""
    moments = {"adamw_8bit": 2, "muon": 4, "sgd": 0, "rmsprop": 4}.get(optim, 8)
    return moments + (0 if dtype == "float32" else 4)


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
    tiled = train.tiled_mlp and shape.experts == 1  # experts are never tiled
    tile = inner * min(tokens, shape.hidden) if tiled else 0
    layer += 0 if tiled else inner * tokens
    if not student.gradient_checkpointing:
        return Activations(layer * shape.layers + tile, 0)
    # The input of each layer, and all of the one that is being recomputed.
    inputs, layer = unit * shape.layers, layer + tile
    return (
        Activations(layer, inputs) if train.offload_activations else Activations(inputs + layer, 0)
    )


def _head(
    shape: ModelShape,
    student: StudentSettings,
    loss: LossSettings,
    *,
    element: int,
    device_bytes: int | None,
) -> int:
    """Return the bytes of a chunk of logits, and on a GPU of the sum of the weight's gradient."""
    layout = chunk_layout(
        chunk_rows=loss.chunk_rows, vocab=shape.vocab_size, head_rows=shape.vocab_size,
        element_bytes=element, device_bytes=device_bytes,
    )  # fmt: skip
    if device_bytes is None:
        return 3 * 4 * layout.rows * layout.vocab
    # The buffer, and as much again for a soft cap. Where the head learns: its gradient's sum in
    # float32, and the sum as a gradient of the weight's type.
    learns = 0 if student.lora.enabled else shape.embedding * (4 if element == 4 else 6)
    return 2 * layout.bytes(element) + learns


def training_flops(
    shape: ModelShape, student: StudentSettings, *, tokens: float, mean_length: float = 0.0
) -> float:
    """Return the operations of training on so many tokens.

    Two operations a parameter and token forward, two backward for the inputs, two for the weights
    (not of frozen ones under LoRA), and two where the forward pass is computed again; attention's
    own products once forward, twice backward, and once where they are computed again.

    Args:
        shape: of the student, pruned.
        student: its adapters and checkpointing.
        tokens: of the whole run.
        mean_length: tokens of a sequence, all taken to be as long; 0 leaves attention's own
            products out. Where lengths differ there are more.
    """
    again = 1.0 if student.gradient_checkpointing else 0.0
    passes = 2.0 + 2.0 + (0.0 if student.lora.enabled else 2.0) + 2.0 * again
    flops = passes * shape.used_parameters * tokens
    if mean_length:
        sequences = tokens / mean_length
        flops += (3.0 + again) * sequences * _attention_flops(shape, mean_length)
    return flops


def _attention_flops(shape: ModelShape, length: float) -> float:
    """Return the operations of attention's two products in all layers, forward, of a sequence."""
    windows = shape.windows or (None,) * shape.layers
    pairs = sum(attended_pairs(length, window) for window in windows)
    return 2 * 2 * pairs * shape.heads * shape.head_dim


def model_flops(
    shape: ModelShape, student: StudentSettings, *, lengths: Sequence[int], loss_tokens: int
) -> float:
    """Return the operations that a forward and a backward pass need, nothing computed twice.

    6 a parameter of the layers and token (4 where the weights are frozen under LoRA); the same for
    the head, at supervised tokens alone; and attention's own products, each token with those before
    it in its sequence that the layer sees. What a layer with a state does instead is not counted.

    Args:
        shape: of the student.
        student: its adapters.
        lengths: tokens of each sequence.
        loss_tokens: supervised ones.
    """
    passes = 4.0 if student.lora.enabled else 6.0
    layers = passes * (shape.used_parameters - shape.embedding) * sum(lengths)
    head = passes * shape.embedding * loss_tokens
    # Forward once and backward twice.
    attention = 3 * sum(_attention_flops(shape, length) for length in lengths)
    return layers + head + attention
