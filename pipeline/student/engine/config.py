"""DeepSpeed's configuration for the settings of a run, and what this machine cannot serve."""

from __future__ import annotations

from typing import Any

from pipeline.errors import Mistakes
from pipeline.student.settings.train import TrainSettings

__all__ = ["check_parallel", "deepspeed_config"]

_MB = 1_000_000


def deepspeed_config(
    settings: TrainSettings, *, dtype: str, world_size: int, on_gpu: bool
) -> dict[str, Any]:
    """Return DeepSpeed's configuration for these settings.

    Args:
        settings: of the training.
        dtype: of weights and activations: `float32`, `bfloat16` or `float16`.
        world_size: processes.
        on_gpu: whether each has one.
    """
    accumulation = settings.gradient_accumulation_steps
    config: dict[str, Any] = {
        # A micro-batch is one flattened row of packs, whatever their number.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * world_size,
        "gradient_clipping": settings.max_grad_norm,
        "steps_per_print": 1 << 30,
        # It waits for the device before and after each micro-batch, for a line that nobody prints.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        # Its list of tested optimisers is Adam and Adagrad; ours all work number by number.
        "zero_allow_untested_optimizer": True,
        "zero_optimization": _zero(settings, dtype=dtype, world_size=world_size, on_gpu=on_gpu),
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }
    if settings.accumulates_float32(dtype=dtype):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if settings.offload_optimizer:
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def _zero(settings: TrainSettings, *, dtype: str, world_size: int, on_gpu: bool) -> dict[str, Any]:
    stage = settings.stage(dtype=dtype, world_size=world_size)
    wide = dtype == "float32" or (stage == 1 and settings.accumulates_float32(dtype=dtype))
    overlap = on_gpu if settings.overlap_comm is None else settings.overlap_comm
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": overlap and stage > 0,
        "reduce_bucket_size": _elements(settings.reduce_bucket_mb, 4 if wide else 2),
        "allgather_bucket_size": _elements(settings.gather_bucket_mb, _size(dtype)),
    }
    if settings.optim == "muon":
        zero["reduce_scatter"] = False  # it needs whole matrices
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": _elements(settings.prefetch_bucket_mb, _size(dtype)),
            # The export gathers by hand, parameter by parameter.
            "stage3_gather_16bit_weights_on_model_save": False,
            "zero_hpz_partition_size": settings.hpz_partition_size,
            "zero_quantized_weights": settings.quantized_weights,
            "zero_quantized_gradients": settings.quantized_gradients,
        }
    place: dict[str, Any] = {"device": "cpu"}
    if settings.offload_folder is not None:
        place = {"device": "nvme", "nvme_path": settings.offload_folder}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = dict(place)
    if settings.offload_parameters:
        zero["offload_param"] = dict(place)
    return zero


def _size(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _elements(megabytes: int, size: int) -> int:
    # DeepSpeed wants an even number.
    return megabytes * _MB // size // 2 * 2


def check_parallel(settings: TrainSettings, *, world_size: int | None, on_gpu: bool) -> None:
    """Reject what this machine or this number of processes does not have.

    Args:
        settings: of the training.
        world_size: processes; None where a launcher may start several later.
        on_gpu: whether each has one.

    Raises:
        ConfigError: all mistakes at once.
    """
    mistakes = Mistakes()
    for name in ("hpz_partition_size", "quantized_weights", "quantized_gradients"):
        if name in settings.needs_stage_3 and not on_gpu:
            mistakes.add(
                f"train.{name}: found {settings.shown(name)} on a machine without a GPU, "
                "expected one: DeepSpeed has ZeRO++ for GPUs"
            )
    group = settings.hpz_partition_size
    if on_gpu and world_size is not None and world_size % group:
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        mistakes.add(
            f"train.hpz_partition_size: found {group} with {processes}, expected a "
            "number that divides them, such as the GPUs of a node"
        )
    mistakes.raise_any()
