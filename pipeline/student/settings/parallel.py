"""Settings of ZeRO: what is divided among processes, offloaded, sent in which pieces."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config import Settings, option, rule

__all__ = ["ParallelSettings"]


class ParallelSettings(Settings):
    """How weights, gradients and the optimiser's state are divided, kept and exchanged."""

    zero_stage: int | None = option(
        None,
        "DeepSpeed ZeRO stage (none: 3 with an option that needs it, 0 for one process in float32, "
        "else 1 where gradients are accumulated, else 2; 16-bit weights have no stage 0, there 0 "
        "is 1)",
        ge=0,
        le=3,
    )
    accumulate_float32: bool = option(
        True,
        "sum the gradients of 16-bit weights over gradient_accumulation_steps in float32 (stage 1: "
        "4 bytes a weight; stages 2 and 3: divided by the processes)",
    )
    offload_optimizer: bool = option(False, "keep the optimiser's state in CPU memory")
    offload_parameters: bool = option(False, "keep the weights in CPU memory as well (ZeRO 3)")
    offload_folder: str | None = option(
        None,
        "folder on a local NVMe disk for what is offloaded, instead of CPU memory (ZeRO 3; needs "
        "libaio)",
    )
    overlap_comm: bool | None = option(
        None, "reduce gradients while the backward pass runs (none: yes on a GPU)"
    )
    reduce_bucket_mb: int = option(
        256, "MB of gradients that are reduced at a time (twice that with overlap_comm)", ge=1
    )
    gather_bucket_mb: int = option(
        256, "MB of updated weights that are gathered at a time (ZeRO 1 and 2)", ge=1
    )
    prefetch_bucket_mb: int = option(
        100, "MB of weights that are gathered ahead of their use (ZeRO 3)", ge=0
    )
    hpz_partition_size: int = option(
        1,
        "ZeRO++: each so many processes (those of a node) keep all weights once more, for the "
        "backward pass (ZeRO 3 on GPUs)",
        ge=1,
    )
    quantized_weights: bool = option(
        False, "ZeRO++: gather weights in 8 bits (ZeRO 3 on GPUs; weights are rounded)"
    )
    quantized_gradients: bool = option(
        False, "ZeRO++: reduce gradients in 4 bits (ZeRO 3 on GPUs; gradients are rounded)"
    )

    @property
    def needs_stage_3(self) -> list[str]:
        """The options in use that only ZeRO 3 has."""
        found = {
            "offload_parameters": self.offload_parameters,
            "offload_folder": self.offload_folder is not None,
            "hpz_partition_size": self.hpz_partition_size > 1,
            "quantized_weights": self.quantized_weights,
            "quantized_gradients": self.quantized_gradients,
        }
        return [name for name, used in found.items() if used]

    def shown(self, name: str) -> str:
        """Return an option's value as a file or a flag has it."""
        value = getattr(self, name)
        return str(value).lower() if isinstance(value, bool) else str(value)

    @rule
    def _options_of_stages(self) -> Iterator[str]:
        if self.offload_optimizer and self.zero_stage == 0:
            yield (
                "train.offload_optimizer: found true with train.zero_stage 0, which keeps the "
                "optimiser's state on the device; expected stage 1, 2 or 3"
            )
        if self.zero_stage not in (None, 3):
            for name in self.needs_stage_3:
                yield (
                    f"train.{name}: found {self.shown(name)} with train.zero_stage "
                    f"{self.zero_stage}, expected stage 3, or none"
                )
        if self.offload_folder is not None and not (
            self.offload_optimizer or self.offload_parameters
        ):
            yield (
                f"train.offload_folder: found {self.offload_folder!r} without anything that is "
                "offloaded; expected train.offload_optimizer or train.offload_parameters as well"
            )
