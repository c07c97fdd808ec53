"""What a run of stage two will take, before it takes it: steps, tokens, memory, time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from pipeline.amounts import format_bytes, format_duration
from pipeline.data.order.plan import TrainPlan
from pipeline.errors import ResourceError
from pipeline.models.resolve import read_model_config
from pipeline.observe.memory import available_memory_bytes, free_disk_bytes
from pipeline.student.inputs import Inputs

__all__ = ["Estimate", "check_resources", "estimate", "print_estimate"]

_BASE_BYTES = 1 << 30
_ACTIVATION_FLOATS = 40
"""Floats kept per token, layer and hidden unit without checkpointing (Llama-like, measured by
peak memory at 2,048 tokens; a bound, not a fit)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimates for the whole run."""

    rows: int
    tokens_per_epoch: int
    steps: int
    steps_per_epoch: int
    packs_per_step: int
    fill: float
    parameters: int
    memory_bytes: int
    disk_bytes: int


def estimate(inputs: Inputs, world_size: int) -> Estimate:
    """Estimate by arithmetic; reads the cache's row lengths and the student's config only."""
    plan = TrainPlan(
        inputs.vocabulary.train,
        seed=inputs.seed,
        packs_per_step=inputs.packs_per_step(world_size),
        pack_length=inputs.data.pack_length or inputs.pack_length(),
        shuffle_shards=inputs.data.shuffle_shards,
        lanes=inputs.data.lanes,
        packing=inputs.data.packing,
        batch_tokens=inputs.data.batch_tokens,
        totals=inputs.vocabulary.totals,
    )
    train = inputs.train
    steps = train.max_steps or max(1, math.ceil(train.num_train_epochs * plan.steps_per_epoch))
    parameters, hidden, layers, vocab = _shape(inputs)
    state = _state_bytes(inputs) * parameters
    tokens = train.per_device_train_batch_size * plan.pack_length
    if inputs.data.batch_tokens is not None:
        parts = world_size * train.gradient_accumulation_steps
        tokens = inputs.data.batch_tokens // parts + plan.totals.longest
    activations = 4 * tokens * hidden * layers * _ACTIVATION_FLOATS
    head = 3 * 4 * inputs.loss.chunk_rows * vocab
    return Estimate(
        rows=plan.totals.rows,
        tokens_per_epoch=plan.totals.tokens,
        steps=steps,
        steps_per_epoch=plan.steps_per_epoch,
        packs_per_step=inputs.packs_per_step(world_size),
        fill=plan.fill,
        parameters=parameters,
        memory_bytes=int(_BASE_BYTES + state + activations + head),
        disk_bytes=int((train.keep_checkpoints + 1) * state + 4 * parameters),
    )


def _state_bytes(inputs: Inputs) -> int:
    """Return the bytes that training keeps for each parameter."""
    # float32 weights, gradients and two moments, or a 16-bit copy beside float32 masters. With
    # LoRA the weights alone, and a byte for adapters of up to 6 % of them.
    return 5 if inputs.student.lora.enabled else 16


def check_resources(inputs: Inputs, plan: Estimate) -> None:
    """Reject a run that does not fit the machine.

    Raises:
        ResourceError: too little memory (on a CPU) or disk.
    """
    import torch

    available = available_memory_bytes()
    if not torch.cuda.is_available() and available is not None and plan.memory_bytes > available:
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


def print_estimate(inputs: Inputs, plan: Estimate) -> None:
    """Print the plan; the time comes from this machine's speed in matrix products."""
    kept = f", layers {list(inputs.student.keep_layers)}" if inputs.student.keep_layers else ""
    print(
        f"student      {inputs.student.model}{kept}, about {plan.parameters / 1e6:.0f} M parameters"
    )
    print(f"cache        {inputs.cache_url} ({inputs.cache.manifest.identity_digest[:12]})")
    print(f"samples      {plan.rows}, {plan.tokens_per_epoch} tokens an epoch")
    print(f"packing      {100 * plan.fill:.1f} % of the capacity used")
    budget = inputs.data.batch_tokens
    size = f"at most {budget} tokens" if budget else f"{plan.packs_per_step} packs"
    print(f"steps        {plan.steps} of {size}")
    available = available_memory_bytes()
    free = "unknown" if available is None else format_bytes(available)
    print(f"memory       about {format_bytes(plan.memory_bytes)}, {free} free")
    print(f"disk         about {format_bytes(plan.disk_bytes)} at {inputs.output_dir}")
    check_resources(inputs, plan)
    rate = _matmul_flops_per_s()
    # Two operations a parameter and token forward, four backward.
    seconds = 6.0 * plan.parameters * plan.tokens_per_epoch * _epochs(inputs, plan) / rate
    print(f"time         about {format_duration(seconds)} at {rate / 1e9:.0f} GFLOP/s (calibrated)")


def _epochs(inputs: Inputs, plan: Estimate) -> float:
    train = inputs.train
    if train.max_steps is None:
        return float(train.num_train_epochs)
    return plan.steps / plan.steps_per_epoch


def _matmul_flops_per_s() -> float:
    """Measure a matrix product of the shape that training spends its time in."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
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


def _shape(inputs: Inputs) -> tuple[int, int, int, int]:
    """Return parameters, hidden size, layers and vocabulary from the config alone."""
    config = read_model_config(inputs.source.path)
    config = config.get("text_config", config)
    hidden = int(config.get("hidden_size") or config["n_embd"])
    total_layers = int(config.get("num_hidden_layers") or config["n_layer"])
    layers = len(inputs.student.keep_layers) if inputs.student.keep_layers else total_layers
    vocab = int(config["vocab_size"])
    inner = int(config.get("intermediate_size") or 4 * hidden)
    heads = int(config.get("num_attention_heads") or config["n_head"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    attention = 2 * hidden * hidden * (1 + kv_heads / heads)
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings", True) else 2)
    parameters = int(layers * (attention + 3 * hidden * inner) + embeddings)
    return parameters, hidden, layers, vocab
