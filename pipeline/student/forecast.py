"""What training takes on devices that this machine does not have, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.amounts import format_bytes, format_duration
from pipeline.loss.settings import LossSettings
from pipeline.models.shape import ModelShape
from pipeline.observe.devices import BANDWIDTH_SHARE, FULL_SHARE, TRAINING_SHARE, Device
from pipeline.student.costs import TrainingMemory, training_flops, training_memory
from pipeline.student.settings.student import StudentSettings
from pipeline.student.settings.train import TrainSettings

__all__ = ["Forecast", "forecast_lines", "forecast_training"]

_GIB = 1 << 30
_SOME = 1 << 16
"""Tokens; from here on each more takes as many bytes."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one of the devices, and of all of them for the time."""

    memory: TrainingMemory
    other_way: TrainingMemory
    """With gradient checkpointing where the run has none, without where it has it."""
    limit: int
    """Bytes of the device that training may fill."""
    longest_pack: int
    """Tokens of a forward pass that fit, with gradient checkpointing; 0 where none does. Of a whole
    pass, where processes share one."""
    slices: int
    """Processes that share a pass."""
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the run, as it is set, does."""
        return self.memory.device <= self.limit


def forecast_training(
    shape: ModelShape,
    student: StudentSettings,
    train: TrainSettings,
    loss: LossSettings,
    device: Device,
    *,
    devices: int,
    step_tokens: int,
    tokens: float,
    steps: int = 0,
    mean_length: float = 0.0,
) -> Forecast:
    """Compute memory and time.

    The time is that of the operations, and of one read and one write of weights, gradients and
    optimiser's state in each step. What devices send each other is not in it.

    Args:
        shape: of the student, pruned.
        student: its adapters and checkpointing.
        train: its precision, ZeRO stage and offloading.
        loss: rows of a chunk.
        device: one of them.
        devices: how many, one process each.
        step_tokens: of one forward pass of one process.
        tokens: of the whole run.
        steps: of the whole run.
        mean_length: tokens of a sequence; 0 leaves attention's own products out.
    """

    def memory(tokens: int, *, checkpointing: bool) -> TrainingMemory:
        return training_memory(
            shape,
            student.model_copy(update={"gradient_checkpointing": checkpointing}), train, loss,
            tokens=tokens, world_size=devices, dtype=train.dtype(on_gpu=True),
            device_bytes=int(device.memory_gib * _GIB),
        )  # fmt: skip

    checkpointing = student.gradient_checkpointing
    limit = int(FULL_SHARE * device.memory_gib * _GIB)
    some, many = (memory(count, checkpointing=True) for count in (_SOME, 2 * _SOME))
    per_token = (many.activations - some.activations) / _SOME
    longest = max(0, int(_SOME + (limit - some.device) / per_token))
    flops = training_flops(shape, student, tokens=tokens, mean_length=mean_length)
    planned = memory(step_tokens, checkpointing=checkpointing)
    updates = 2 * steps * planned.state / (BANDWIDTH_SHARE * device.bytes_per_s)
    return Forecast(
        memory=planned,
        other_way=memory(step_tokens, checkpointing=not checkpointing),
        limit=limit,
        longest_pack=longest * train.sequence_parallel_size,
        slices=train.sequence_parallel_size,
        seconds=flops / (TRAINING_SHARE * device.flops * devices) + updates,
    )


def forecast_lines(
    forecast: Forecast, device: Device, *, devices: int, zero_stage: int
) -> list[str]:
    """Return the lines of a plan: parts of the memory, what helps where it is short, the time."""
    memory, other = forecast.memory, forecast.other_way
    parts = [
        f"{format_bytes(size)} {name}"
        for name, size in (
            ("weights, gradients and optimiser", memory.state),
            ("activations", memory.activations),
            ("a chunk of logits and the head's gradient", memory.head),
        )
    ]
    slices = forecast.slices
    lines = [
        f"devices      {devices} x {device.name}, by arithmetic: nothing was run on them",
        f"memory       about {format_bytes(memory.device)} of {format_bytes(forecast.limit)} a "
        f"device: {', '.join(parts)}",
    ]
    if memory.offloaded:
        lines.append(f"             and {format_bytes(memory.offloaded)} a process on the CPU")
    if not forecast.fits:
        advice = []
        if other.device < memory.device:
            with_it = "fits" if other.device <= forecast.limit else "is not enough"
            advice.append(
                f"--student.gradient_checkpointing true {with_it} ({format_bytes(other.device)})"
            )
        if zero_stage < 3 and devices > 1:
            advice.append(f"--train.zero_stage {zero_stage + 1} or more divides the state further")
        if slices == 1 and devices > 1:
            advice.append(f"--train.sequence_parallel_size {devices} divides the activations")
        advice += ["--train.offload_optimizer true", "more devices, or a shorter pack"]
        lines.append(f"does not fit {'; '.join(advice)}")
    peak = device.flops * devices / 1e12
    sharing = "a process" if slices == 1 else f"a pass, shared by {slices} processes"
    lines += [
        f"longest pack about {forecast.longest_pack} tokens {sharing}, with checkpointing",
        f"time         about {format_duration(forecast.seconds)} at "
        f"{100 * TRAINING_SHARE:.0f} % of the devices' peak ({peak:.0f} TFLOP/s in bfloat16) and "
        f"{100 * BANDWIDTH_SHARE:.0f} % of their memory's rate, without what they send each other",
    ]
    return lines
