"""The shuffled units of one window of a lane: formed when their turn comes, from lengths alone.

Shapes: U units of the window (packs, or rows), R their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.packing import shard_units
from pipeline.data.order.permutation import derive_key, permutation
from pipeline.data.order.step import Pack
from pipeline.data.source import SizeSource

__all__ = ["Piece", "Units", "Window", "shard_order"]

_CUT = 5  # salts of the derived keys are part of the order and never change; see plan.py
_ROWS = 2

Ints = NDArray[np.int64]


class Piece(NamedTuple):
    """The part of a shard that a lane has: units first to stop, of so many."""

    shard: int
    first: int
    stop: int
    units: int


@dataclass(frozen=True, slots=True)
class Units:
    """How rows become units."""

    source: SizeSource
    pack_length: int
    packing: bool
    by_tokens: bool
    """Positions are counted in tokens; else in units."""


@dataclass(frozen=True, slots=True)
class Window:
    """The units of a window in the order of their use."""

    shard_U: NDArray[np.int32]
    rows_R: NDArray[np.int32]
    """Rows of all units, each a number in its shard."""
    bounds: Ints
    """Where each unit starts in `rows_R`, and the end."""
    starts_U: Ints
    """Where each unit starts, from the window's start, in units or tokens."""
    span_U: Ints
    """Tokens of each unit, where a row without any counts as one."""
    tokens_U: Ints
    loss_tokens_U: Ints

    @classmethod
    def form(
        cls, units: Units, pieces: Sequence[Piece], *, seed: int, epoch: int, key: int
    ) -> Window:
        """Form the packs of the pieces' shards and shuffle those of the pieces.

        Args:
            units: how.
            pieces: of the window.
            seed: of the run.
            epoch: of the run.
            key: of the window's shuffle.
        """
        parts = [_of_piece(units, piece, seed, epoch) for piece in pieces]
        shard_U = np.repeat(
            np.array([piece.shard for piece in pieces], np.int32),
            [len(part.counts_U) for part in parts],
        )
        counts_U = np.concatenate([part.counts_U for part in parts])
        rows_R = np.concatenate([part.rows_R for part in parts])
        sizes_R2 = np.concatenate([part.sizes_R2 for part in parts])
        order_U = permutation(len(counts_U), key)
        index_R, bounds = _gather(counts_U, order_U)
        sizes_R2 = sizes_R2[index_R]
        span_U = _sums(np.maximum(sizes_R2[:, 0], 1), bounds)
        places = np.cumsum(span_U) - span_U if units.by_tokens else np.arange(len(span_U))
        return cls(
            shard_U=shard_U[order_U],
            rows_R=rows_R[index_R],
            bounds=bounds,
            starts_U=places,
            span_U=span_U,
            tokens_U=_sums(sizes_R2[:, 0], bounds),
            loss_tokens_U=_sums(sizes_R2[:, 1], bounds),
        )

    @property
    def num_rows_U(self) -> Ints:
        """Rows of each unit."""
        return np.diff(self.bounds)

    def packs(self, units: Ints) -> list[Pack]:
        """Return some units as packs."""
        return [
            Pack(
                int(self.shard_U[unit]),
                tuple(self.rows_R[self.bounds[unit] : self.bounds[unit + 1]].tolist()),
            )
            for unit in units.tolist()
        ]


def shard_order(units: int, *, seed: int, epoch: int, shard: int) -> Ints:
    """Return the order of a shard's units in which cuts go through it."""
    return permutation(units, derive_key(seed, epoch, _CUT, shard))


class _Part(NamedTuple):
    counts_U: Ints
    rows_R: NDArray[np.int32]
    sizes_R2: NDArray[np.int32]


def _of_piece(units: Units, piece: Piece, seed: int, epoch: int) -> _Part:
    """Return the units of a piece: of the whole shard, or of its part in a shuffled order."""
    sizes_R2 = np.asarray(units.source.shard_sizes(piece.shard))
    made = shard_units(
        sizes_R2[:, 0],
        units.pack_length,
        derive_key(seed, epoch, _ROWS, piece.shard),
        packing=units.packing,
    )
    counts_U, rows_R = np.diff(made.bounds), made.rows_R
    if piece.stop - piece.first < piece.units:
        order = shard_order(piece.units, seed=seed, epoch=epoch, shard=piece.shard)
        mine = order[piece.first : piece.stop]
        index_R, _ = _gather(counts_U, mine)
        counts_U, rows_R = counts_U[mine], rows_R[index_R]
    return _Part(counts_U, rows_R.astype(np.int32), sizes_R2[rows_R])


def _gather(counts_U: Ints, order_U: Ints) -> tuple[Ints, Ints]:
    """Return where the rows of units in another order are, and the bounds of the units there."""
    starts_U = np.cumsum(counts_U) - counts_U
    picked_U = counts_U[order_U]
    bounds = np.concatenate([[0], np.cumsum(picked_U)]).astype(np.int64)
    shift_U = starts_U[order_U] - bounds[:-1]
    return np.arange(bounds[-1]) + np.repeat(shift_U, picked_U), bounds


def _sums(values_R: NDArray[np.int32], bounds: Ints) -> Ints:
    sums = np.concatenate([[0], np.cumsum(values_R, dtype=np.int64)])
    summed: Ints = sums[bounds[1:]] - sums[bounds[:-1]]
    return summed
