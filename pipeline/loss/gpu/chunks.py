"""Rows and widths of the head's chunks, by arithmetic; imports no torch.

On a CPU a chunk is as wide as the vocabulary and has 512 rows: the exponentials and the matrix
products are what takes time, whatever the chunk. On a GPU each chunk also pays for a pass over the
weight's gradient, 8 bytes a weight, so a chunk is as long as memory allows; and a tensor core's
kernels want rows that begin at multiples of 16 bytes, which vocabularies of odd size do not give.

Shapes: U tokens of the vocabulary, V rows of the head, P columns of the matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALIGNMENT", "CPU_ROWS", "ChunkLayout", "aligned", "chunk_layout"]

ALIGNMENT = 64
"""Columns: 128 bytes of a 16-bit type, a line of a GPU's cache."""
CPU_ROWS = 512
"""Rows of a chunk on a CPU."""
_MOST_GPU_ROWS = 4096
"""More rows save little: at 4,096 the sums over chunks are below a tenth of the products."""
_ROW_STEP = 128
"""Rows of a tile of a GPU's matrix product."""
_SHARE = 32
"""A chunk takes at most this part of a GPU's memory. Of all of it, not of what is free: the
division into chunks changes the order of sums, and a run that is repeated repeats its digits."""


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """How the logits of a chunk lie in memory."""

    rows: int
    vocab: int
    """U: columns that the loss reads."""
    products: int
    """P >= U: columns of the matrix products, those past U zero in the gradient."""
    stride: int
    """Elements from one row to the next, at least P."""

    def bytes(self, element_bytes: int) -> int:
        """Return the bytes of the buffer."""
        return self.rows * self.stride * element_bytes


def aligned(width: int) -> int:
    """Return the next multiple of `ALIGNMENT`."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def chunk_layout(
    *,
    chunk_rows: int | None,
    vocab: int,
    head_rows: int,
    element_bytes: int,
    device_bytes: int | None,
    arrays: int = 1,
) -> ChunkLayout:
    """Return rows and widths of a chunk of logits.

    Args:
        chunk_rows: as set by the user; None chooses.
        vocab: U.
        head_rows: V; where the head has that many rows, the products are of the aligned width too,
            since kernels also want sizes that are multiples of 8.
        element_bytes: of a logit.
        device_bytes: memory of the GPU; None on a CPU, where nothing is aligned.
        arrays: of a chunk's size that are alive at one time, 2 under a soft cap.
    """
    if device_bytes is None:
        return ChunkLayout(chunk_rows or CPU_ROWS, vocab, vocab, vocab)
    stride = aligned(vocab)
    rows = chunk_rows
    if rows is None:
        fitting = device_bytes // _SHARE // (stride * element_bytes * arrays)
        rows = min(max(fitting // _ROW_STEP * _ROW_STEP, _ROW_STEP), _MOST_GPU_ROWS)
    return ChunkLayout(rows, vocab, stride if stride <= head_rows else vocab, stride)
