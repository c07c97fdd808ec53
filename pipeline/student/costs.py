"""What a training step needs of a device, by arithmetic over the student's shape and settings."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.loss.settings import LossSettings
from pipeline.models.shape import ModelShape
from pipeline.student.settings import StudentSettings
from pipeline.student.train_settings import TrainSettings

__all__ = ["TrainingMemory", "training_flops", "training_memory"]

_BASE_BYTES = 1 << 30
"""Interpreter, torch and, on a GPU, its context."""
_ACTIVATION_FLOATS = 40
"""Numbers kept per token, layer and hidden unit without checkpointing (Llama-like, measured by
peak memory at 2,048 tokens; a bound, not a fit)."""
_ADAPTER_SHARE = 1 / 16
"""Adapters hold up to this share of the weights."""


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of one process, by what they are for."""

    state: int
    """Weights, gradients, and the optimiser's state where it is not offloaded."""
    activations: int
    head: int
    """Logits and their gradient of one chunk."""
    offloaded: int = 0
    """What is in CPU memory instead: the optimiser's state, the weights."""

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
) -> TrainingMemory:
    """Estimate the memory of one process.

    Args:
        shape: of the student, pruned.
        student: its adapters and checkpointing.
        train: its ZeRO stage and offloading.
        loss: rows of a chunk.
        tokens: of one forward pass.
        world_size: processes that ZeRO divides the state among.
        dtype: `float32`, `bfloat16` or `float16`.
    """
    element = 4 if dtype == "float32" else 2
    kept = tokens * shape.hidden * shape.layers * element
    if student.gradient_checkpointing:
        # The input of each layer, and all of the one that is being recomputed.
        activations = kept + kept // shape.layers * _ACTIVATION_FLOATS
    else:
        activations = kept * _ACTIVATION_FLOATS
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
        activations=int(activations),
        head=3 * 4 * loss.chunk_rows * shape.vocab_size,
        offloaded=0 if train.offload_folder is not None else int(offloaded),
    )


def _optimizer_bytes(optim: str, dtype: str) -> int:
    """Return the bytes for each weight: moments, and float32 masters where weights have 16 bits."""
    moments = {"adamw_8bit": 2, "muon": 4, "sgd": 0, "rmsprop": 4}.get(optim, 8)
    return moments + (0 if dtype == "float32" else 4)


def training_flops(shape: ModelShape, student: StudentSettings, *, tokens: float) -> float:
    """Return the operations of training on so many tokens; attention's own products are left out.

    Two operations a parameter and token forward, two backward for the inputs, two for the weights
    (not of frozen ones under LoRA), and two where the forward pass is computed again.
    """
    passes = 2.0 + 2.0 + (0.0 if student.lora.enabled else 2.0)
    passes += 2.0 if student.gradient_checkpointing else 0.0
    return passes * shape.used_parameters * tokens
