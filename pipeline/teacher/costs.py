"""What a teacher needs of memory, disk and time, by arithmetic over its shape and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipeline.models.shape import ModelShape
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme

__all__ = [
    "cache_bytes",
    "device_memory",
    "expected_entries",
    "host_memory",
    "reading_flops",
    "stored_bytes",
    "writing_rate",
]

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BASE_BYTES = 1 << 30
"""Interpreter, torch and the engine's own code: 0.8 to 1.1 GB measured."""
_ENTRY_BYTES = 2.2
"""Of an entry on disk after zstd: a gap of 1.2 bytes and a value of 1 (measured at k = 64)."""
_SAMPLED_BYTES = 1.7
"""Of an entry of a sampled scheme, with its share of everything beside it
(`make bench-fidelity`)."""
_SEQUENCE_BYTES = 2.5
_WRITTEN_BYTES, _REQUESTED_BYTES = 1.9, 1.6
"""Of a token of a sequence: its id and its mask."""


def cache_bytes(
    scheme: SparseScheme,
    *,
    tokens: float,
    loss_tokens: float,
    entries: float | None = None,
    generate: Mapping[str, Any] | None = None,
) -> int:
    """Estimate the size of a cache.

    Args:
        scheme: of the capture.
        tokens: of all sequences.
        loss_tokens: supervised ones.
        entries: of a position, where they were measured; None: `expected_entries`.
        generate: the identity's part of the responses, which says what their writer records; None:
            nobody writes.
    """
    kept, grid = entries or expected_entries(scheme), len(scheme.temperatures)
    if scheme.rule is not None:
        target = kept * _SAMPLED_BYTES + 2 * (grid - 1)
    else:
        target = kept * _ENTRY_BYTES + 2 * (2 + 2 * grid)
    if generate is not None:
        target += _WRITTEN_BYTES * bool(generate.get("record_logprobs"))
        target += _REQUESTED_BYTES * int(generate.get("record_top_k", 0))
    return int(loss_tokens * target + tokens * _SEQUENCE_BYTES)


def expected_entries(scheme: SparseScheme) -> float:
    """Estimate the mean entries of a position, the label included.

    A rule of temperature 1 keeps 7.8, 18.5 and 51 at taus of 1/16, 1/50 and 1/200 (SmolLM2-135M on
    technical prose, a flat case), about tau^-0.75; at higher temperatures nearly all mass is in
    entries below tau, and 1 / tau are kept.
    """
    if scheme.rule is None:
        return scheme.top_k
    if scheme.mean_entries is not None:
        return scheme.mean_entries
    sampled = [
        tau**-0.75 if temperature <= 1 else 1 / tau
        for temperature, tau in zip(scheme.rule.temperatures, scheme.rule.taus, strict=True)
        if tau
    ]
    return 1 + scheme.top_k + math.hypot(*sampled)


def _target_bytes(scheme: SparseScheme, entries: float) -> float:
    grid = len(scheme.temperatures)
    if scheme.rule is not None:
        return entries * _SAMPLED_BYTES + 2 * (grid - 1)
    return entries * _ENTRY_BYTES + 2 * (2 + 2 * grid)


def stored_bytes(config: Mapping[str, Any]) -> int:
    """Return the bytes of a stored weight that is not quantised: 2 or 4."""
    return 2 if str(config.get("dtype") or config.get("torch_dtype")) != "float32" else 4


def host_memory(
    weight_bytes: int,
    settings: TeacherSettings,
    capture: CaptureSettings,
    scheme: SparseScheme,
    *,
    vocab_size: int,
    tokens: int,
    stored: int,
    dtype: str,
) -> int:
    """Estimate the memory of a worker whose teacher is on the CPU.

    Args:
        weight_bytes: of the weight files.
        settings: its engine.
        capture: rows of the head, size of a shard.
        scheme: of the capture.
        vocab_size: of the teacher.
        tokens: of the corpus.
        stored: bytes of a stored weight.
        dtype: that the teacher computes in.
    """
    weights = weight_bytes / stored * _DTYPE_BYTES[dtype]
    cache_gib = settings.kv_cache_gib if settings.engine == "vllm" else 0.0
    columns = 4 * scheme.first_phase.num_columns * 2 * min(capture.shard_tokens, tokens)
    logits = _logits_bytes(capture, vocab_size)
    return int(_BASE_BYTES + weights + logits + cache_gib * (1 << 30) + columns)


def device_memory(
    shape: ModelShape,
    settings: TeacherSettings,
    capture: CaptureSettings,
    *,
    max_length: int,
    resident: int | None = None,
) -> int:
    """Estimate the least memory of one of the GPUs that share a teacher.

    vLLM takes all of `gpu_memory_utilization` and gives what is left to the key-value cache; this
    is what must fit.

    Args:
        shape: of the teacher.
        settings: how many GPUs share it, tokens of a forward pass.
        capture: rows of the head.
        max_length: tokens of the longest sequence.
        resident: tokens in the key-value cache at a time; None: those of one forward pass.
    """
    parallel = settings.tensor_parallel_size
    stages = settings.devices / parallel  # of a pipeline, each with its share of the layers
    # A head of keys and values that more GPUs than there are heads share is on each of them.
    kv_bytes = shape.kv_bytes / stages * math.ceil(shape.kv_heads / parallel) / shape.kv_heads
    step = max(settings.step_tokens, max_length + 1)
    held = max(resident or 0, step)
    # Of a layer at a time: the stream, its norm, queries, keys and values, two MLP halves.
    widest = shape.inner * shape.active_experts / parallel
    activations = step * 2 * (6 * shape.hidden + 3 * widest)
    return int(
        _BASE_BYTES
        + shape.weight_bytes / settings.devices
        + activations
        + _logits_bytes(capture, shape.vocab_size)
        + held * kv_bytes
    )


def reading_flops(shape: ModelShape, *, tokens: float) -> float:
    """Return the operations of reading so many tokens; attention's own products are left out."""
    return 2.0 * shape.used_parameters * tokens


def writing_rate(
    shape: ModelShape,
    settings: TeacherSettings,
    *,
    sequences: int,
    context: float,
    bytes_per_s: float,
) -> float:
    """Return the tokens a second that a teacher writes, bound by the memory it reads.

    Each step reads the weights once (with many sequences at a time, of all experts) and the keys
    and values of every sequence.

    Args:
        shape: of the teacher.
        settings: how many GPUs share it.
        sequences: written at a time.
        context: mean tokens before the one written.
        bytes_per_s: that one GPU reads.
    """
    parallel = settings.tensor_parallel_size
    kv_bytes = shape.kv_bytes * math.ceil(shape.kv_heads / parallel) / shape.kv_heads
    step = shape.weight_bytes / parallel + sequences * context * kv_bytes
    return sequences * bytes_per_s / step


def _logits_bytes(capture: CaptureSettings, vocab_size: int) -> int:
    return 4 * capture.chunk_rows * vocab_size * 4  # four float32 copies at most
