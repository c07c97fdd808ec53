"""What a run of stage two will take, before it takes it: steps, tokens, memory, time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.amounts import format_bytes, format_duration
from pipeline.data.order.choose import make_plan
from pipeline.data.order.mixed_plan import MixedPlan
from pipeline.errors import ResourceError
from pipeline.models.device import uses_gpu
from pipeline.models.resolve import read_model_config
from pipeline.models.shape import ModelShape, model_shape
from pipeline.observe.devices import Device
from pipeline.observe.memory import available_memory_bytes, free_disk_bytes
from pipeline.student.costs import training_flops, training_memory
from pipeline.student.forecast import forecast_lines, forecast_training
from pipeline.student.inputs import Inputs

__all__ = ["Estimate", "check_resources", "estimate", "print_estimate", "student_shape"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimates for the whole run."""

    rows: int
    mean_length: float
    """Tokens of a row."""
    tokens_per_epoch: int
    steps: int
    steps_per_epoch: int
    packs_per_step: int
    fill: float
    parameters: int
    pass_tokens: int
    """Of one forward pass of one process."""
    memory_bytes: int
    disk_bytes: int
    cache_epochs: Mapping[str, float] = field(default_factory=dict)
    """How often the run goes through each cache of a mixture, by tag."""


def estimate(inputs: Inputs, world_size: int) -> Estimate:
    """Estimate by arithmetic; reads the cache's row lengths and the student's config only."""
    plan = make_plan(
        inputs.vocabulary.train,
        inputs.data,
        seed=inputs.seed,
        packs_per_step=inputs.packs_per_step(world_size),
        pack_length=inputs.pack_length(),
        totals=inputs.vocabulary.totals,
    )
    train = inputs.train
    steps = train.max_steps or max(1, math.ceil(train.num_train_epochs * plan.steps_per_epoch))
    shape = student_shape(inputs)
    state = _state_bytes(inputs) * shape.parameters
    tokens = inputs.pass_tokens(world_size)
    on_gpu = uses_gpu()
    memory = training_memory(
        shape,
        inputs.student,
        train,
        inputs.loss,
        tokens=tokens,
        # On a CPU the processes share the memory.
        world_size=world_size if on_gpu else 1,
        dtype=inputs.dtype,
        device_bytes=_device_bytes(),
    )
    return Estimate(
        rows=plan.totals.rows,
        mean_length=plan.totals.tokens / max(plan.totals.rows, 1),
        tokens_per_epoch=plan.tokens_per_epoch,
        steps=steps,
        steps_per_epoch=plan.steps_per_epoch,
        packs_per_step=inputs.packs_per_step(world_size),
        fill=plan.fill,
        parameters=shape.parameters,
        pass_tokens=tokens,
        memory_bytes=memory.device + (0 if on_gpu else memory.offloaded),
        cache_epochs=dict(zip(inputs.tags, plan.epochs(steps), strict=True))
        if isinstance(plan, MixedPlan)
        else {},
        disk_bytes=int((train.keep_checkpoints + 1) * state + 4 * shape.parameters),
    )


def _device_bytes() -> int | None:
    """Return the memory of this machine's first GPU; None without one."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if uses_gpu() else None


def _state_bytes(inputs: Inputs) -> int:
    """Return the bytes that a checkpoint keeps for each parameter, at most."""
    return 5 if inputs.student.lora.enabled else 16


def check_resources(inputs: Inputs, plan: Estimate) -> None:
    """Reject a run that does not fit the machine.

    Raises:
        ResourceError: too little memory (on a CPU) or disk.
    """
    available = available_memory_bytes()
    if not uses_gpu() and available is not None and plan.memory_bytes > available:
        raise ResourceError(
            f"training needs about {format_bytes(plan.memory_bytes)} of memory, "
            f"{format_bytes(available)} are free",
            do="use a smaller student, per_device_train_batch_size or loss.chunk_rows",
        )
    free = free_disk_bytes(inputs.output_dir)
    # A run that goes on has part of its files already; they are replaced, not added to.
    present = sum(f.stat().st_size for f in inputs.output_dir.rglob("*") if f.is_file())
    if plan.disk_bytes - present > free:
        raise ResourceError(
            f"checkpoints need about {format_bytes(plan.disk_bytes)}, "
            f"{format_bytes(free)} are free at {inputs.output_dir}",
            do="free some space, choose another --output_dir, or a smaller train.keep_checkpoints",
        )


def print_estimate(
    inputs: Inputs, plan: Estimate, *, device: Device | None = None, devices: int = 1
) -> None:
    """Print the plan; the time comes from this machine's speed in matrix products.

    Args:
        inputs: of the run.
        plan: its steps.
        device: memory and time are forecast for it, by arithmetic; None: this machine's.
        devices: how many of them, one process each.
    """
    kept = f", layers {list(inputs.student.keep_layers)}" if inputs.student.keep_layers else ""
    print(
        f"student      {inputs.student.model}{kept}, about {plan.parameters / 1e6:.0f} M parameters"
    )
    print(f"cache        {inputs.cache_url} ({inputs.cache.manifest.identity_digest[:12]})")
    if plan.cache_epochs:
        told = ", ".join(f"{tag} {epochs:.2f}" for tag, epochs in plan.cache_epochs.items())
        print(f"mixture      each cache is gone through so often: {told}")
    for tag, counts in inputs.filtered.items():
        print(f"filter       {f'{tag}: ' if tag else ''}{counts.text()} meet {inputs.data.filter}")
    print(f"samples      {plan.rows}, {plan.tokens_per_epoch} tokens an epoch")
    print(f"packing      {100 * plan.fill:.1f} % of the capacity used")
    budget = inputs.data.batch_tokens
    size = f"at most {budget} tokens" if budget else f"{plan.packs_per_step} packs"
    print(f"steps        {plan.steps} of {size}")
    tokens = plan.tokens_per_epoch * _epochs(inputs, plan)
    if device is not None:
        forecast = forecast_training(
            student_shape(inputs), inputs.student, inputs.train, inputs.loss, device,
            devices=devices, step_tokens=plan.pass_tokens, tokens=tokens, steps=plan.steps,
            mean_length=plan.mean_length,
        )  # fmt: skip
        stage = inputs.train.stage(dtype=inputs.train.dtype(on_gpu=True), world_size=devices)
        for line in forecast_lines(forecast, device, devices=devices, zero_stage=stage):
            print(line)
        return
    available = available_memory_bytes()
    free = "unknown" if available is None else format_bytes(available)
    print(f"memory       about {format_bytes(plan.memory_bytes)}, {free} free")
    print(f"disk         about {format_bytes(plan.disk_bytes)} at {inputs.output_dir}")
    check_resources(inputs, plan)
    rate = _matmul_flops_per_s()
    flops = training_flops(
        student_shape(inputs), inputs.student, tokens=tokens, mean_length=plan.mean_length
    )
    seconds = flops / rate
    print(f"time         about {format_duration(seconds)} at {rate / 1e9:.0f} GFLOP/s (calibrated)")


def _epochs(inputs: Inputs, plan: Estimate) -> float:
    train = inputs.train
    if train.max_steps is None:
        return float(train.num_train_epochs)
    return plan.steps / plan.steps_per_epoch


def _matmul_flops_per_s() -> float:
    """Measure a matrix product of the shape that training spends its time in."""
    import torch

    device = "cuda" if uses_gpu() else "cpu"
    size = 4096 if device == "cuda" else 768
    a = torch.randn(size, size, device=device)
    for _ in range(3):
        a @ a
    started = time.monotonic()
    repeats = 10
    for _ in range(repeats):
        product = a @ a
    float(product[0, 0])  # waits for the device
    return 2.0 * size**3 * repeats / (time.monotonic() - started)


def student_shape(inputs: Inputs) -> ModelShape:
    """Return the student's sizes from the config alone."""
    shape = model_shape(read_model_config(inputs.source.path))
    kept = inputs.student.keep_layers
    return shape.pruned(kept) if kept else shape
