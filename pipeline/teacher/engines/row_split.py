"""Ranks that hold the same logits: each reduces its share of the rows, the columns are gathered.

Legend: R rows, S rows of a share, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["RowSplit", "row_share"]


@dataclass(frozen=True, slots=True)
class RowSplit:
    """A rank's place among those that share the rows; one alone takes them all."""

    rank: int = 0
    size: int = 1
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Returns the ranks' [S, C] one below the other; called by every rank equally often."""

    def reduce(self, reduce: Callable[[slice], torch.Tensor], rows: int) -> torch.Tensor:
        """Return [R, C] of all rows, the same on every rank.

        Args:
            reduce: returns [n, C] of a slice of n rows, 0 included, each whatever the others are.
            rows: R, at least 1, the same on every rank.
        """
        if self.size == 1 or self.gather is None:
            return reduce(slice(0, rows))
        mine = row_share(rows, self.rank, self.size)
        part_nC = reduce(mine)
        share = -(-rows // self.size)
        part_SC = part_nC.new_zeros((share, part_nC.shape[1]))  # gathered pieces are of one size
        part_SC[: len(part_nC)] = part_nC
        return self.gather(part_SC)[:rows]


def row_share(rows: int, rank: int, size: int) -> slice:
    """Return a rank's rows: shares of one size, but for the last ones."""
    share = -(-rows // size)
    return slice(min(rank * share, rows), min((rank + 1) * share, rows))
