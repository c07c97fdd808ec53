"""An exponential moving average of the weights in float32, each rank keeping a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ResumeError

__all__ = ["WeightAverage", "shared_out"]

_FILES = "average-*.pt"


def shared_out(sizes: Sequence[int], ranks: int) -> list[int]:
    """Return the rank that keeps each tensor: the largest first, each to the one with least."""
    loads, owners = [0] * ranks, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = min(range(ranks), key=loads.__getitem__)
        loads[owners[index]] += sizes[index]
    return owners


class WeightAverage:
    """`average = decay * average + (1 - decay) * weight` after each step, from the first weights.

    Every rank holds all weights (not under ZeRO 3), so each keeps the average of its share: 4 bytes
    a weight divided by the ranks, and nothing is sent until the end.
    """

    def __init__(
        self, weights: Sequence[tuple[str, Any]], *, decay: float, rank: int, world_size: int
    ) -> None:
        """Begin with the weights as they are.

        Args:
            weights: names and tensors of those that are trained, in the same order on every rank.
            decay: share of the average that a step keeps.
            rank: this process.
            world_size: of how many.
        """
        self._weights = list(weights)
        self._decay, self._rank, self._world_size = decay, rank, world_size
        self._owners = shared_out([weight.numel() for _, weight in weights], world_size)
        self._average = {name: weight.detach().float().clone() for name, weight in self._own()}

    def _own(self) -> list[tuple[str, Any]]:
        pairs = zip(self._weights, self._owners, strict=True)
        return [weight for weight, owner in pairs if owner == self._rank]

    def update(self) -> None:
        """Take in the weights after a step."""
        for name, weight in self._own():
            self._average[name].lerp_(weight.detach().float(), 1 - self._decay)

    def save(self, folder: Path) -> None:
        """Write this rank's share beside a checkpoint's other files."""
        import torch

        torch.save(
            {name: average.cpu() for name, average in self._average.items()},
            folder / _FILES.replace("*", f"{self._rank:05d}"),
        )

    def load(self, folder: Path) -> None:
        """Read this rank's share of what any number of ranks wrote.

        Raises:
            ResumeError: a file is damaged, or a weight is in none of them.
        """
        import torch

        found: dict[str, Any] = {}
        for file in sorted(folder.glob(_FILES)):
            try:
                part = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:
                # torch.load raises whatever the damage leads to.
                raise ResumeError(
                    f"{file}: cannot be loaded ({str(error).strip().splitlines()[0]})",
                    do="delete its folder to go on from the checkpoint before it",
                ) from error
            found.update({name: part[name] for name in self._average if name in part})
        for name, average in self._average.items():
            if name not in found:
                raise ResumeError(
                    f"{folder}: no average of {name}",
                    do="delete that folder to go on from the checkpoint before it",
                )
            average.copy_(found[name])

    def to_weights(self) -> None:
        """Replace the weights by their averages, on every rank."""
        import torch
        import torch.distributed as dist

        with torch.no_grad():
            for (name, weight), owner in zip(self._weights, self._owners, strict=True):
                if owner == self._rank:
                    weight.data.copy_(self._average[name])
                if self._world_size > 1:
                    dist.broadcast(weight.data, src=owner)
