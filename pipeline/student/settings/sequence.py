"""Settings of long packs: slices of a pass for several processes, and what saves its memory."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config import Settings, option, rule
from pipeline.errors import ConfigError

__all__ = ["SequenceSettings"]


class SequenceSettings(Settings):
    """Sequence parallelism, tiles of the MLPs, checkpoints in CPU memory."""

    sequence_parallel_size: int = option(
        1,
        "processes that share each forward pass, each with a slice of its tokens (a divisor of the "
        "processes and of the attention heads)",
        ge=1,
    )
    tiled_mlp: bool = option(
        False,
        "compute each dense MLP (no experts) a tile of tokens at a time and again in the backward "
        "pass: less memory",
    )
    offload_activations: bool = option(
        False, "keep the inputs of checkpointed layers in CPU memory until the backward pass"
    )

    @rule
    def _layers_are_not_compiled(self) -> Iterator[str]:
        # `torch_compile` is declared by the class that inherits this one.
        for name, used in (
            ("sequence_parallel_size", self.sequence_parallel_size > 1),
            ("tiled_mlp", self.tiled_mlp),
            ("offload_activations", self.offload_activations),
        ):
            if used and getattr(self, "torch_compile", False):
                yield (
                    f"train.{name}: found {str(getattr(self, name)).lower()} with "
                    "train.torch_compile, whose "
                    "graphs end at its exchanges and recomputations; expected one of the two"
                )

    def data_parallel_size(self, world_size: int) -> int:
        """Return how many groups of processes train on different packs.

        Args:
            world_size: processes.

        Raises:
            ConfigError: the processes are no multiple of `sequence_parallel_size`.
        """
        size = self.sequence_parallel_size
        groups, rest = divmod(world_size, size)
        if rest or not groups:
            processes = "1 process" if world_size == 1 else f"{world_size} processes"
            raise ConfigError(
                f"train.sequence_parallel_size: found {size} with {processes}",
                expected="a divisor of the number of processes",
                do=f"start a multiple of {size} processes, or choose another size",
            )
        return groups
