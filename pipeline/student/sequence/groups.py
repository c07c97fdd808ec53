"""Which processes share a forward pass, and which slice of it is this process's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["SequenceGroup", "connect_group"]


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """Neighbouring ranks that share the packs of one data-parallel rank.

    Neighbours, because they exchange every layer's heads and those of a node do it fastest. All
    else is as without groups: ZeRO divides the state among all ranks, and DeepSpeed averages
    gradients over all of them. The loss of a rank is the sum over the supervised tokens of its
    slice, so that the scale of the loss has the number of all ranks in it, whatever the groups.
    """

    size: int
    """Ranks of a group."""
    part: int
    """Which slice is this rank's, from 0."""
    data_rank: int
    """Which group this is."""
    data_size: int
    """Groups: what reads different packs."""

    @staticmethod
    def of(rank: int, *, size: int, data_size: int) -> SequenceGroup:
        """Return the group of a rank.

        Args:
            rank: this one, of `size * data_size`.
            size: ranks of a group.
            data_size: groups.
        """
        return SequenceGroup(size, rank % size, rank // size, data_size)

    @property
    def is_shared(self) -> bool:
        """Whether there is more than one slice."""
        return self.size > 1

    def members(self, data_rank: int) -> list[int]:
        """Return the ranks of a group."""
        return list(range(data_rank * self.size, (data_rank + 1) * self.size))


def connect_group(group: SequenceGroup) -> Any:
    """Return torch's process group of this rank; None where a group is one rank.

    Every rank of the run calls it, once and at the same place.
    """
    import torch.distributed as dist

    if not group.is_shared:
        return None
    mine = None
    for data_rank in range(group.data_size):  # each rank takes part in making every group
        made = dist.new_group(group.members(data_rank))
        if data_rank == group.data_rank:
            mine = made
    return mine
