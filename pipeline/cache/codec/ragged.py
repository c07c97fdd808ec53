"""The columns of an Arrow table as numpy arrays, cut into rows without a call into Arrow for each.

A scalar of Arrow costs microseconds, and a row has ten of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

__all__ = ["blob_rows", "list_rows"]


def list_rows(column: pa.ChunkedArray, dtype: DTypeLike) -> Iterator[NDArray[Any]]:
    """Yield the values of each row of a list column; views of one array."""
    for chunk in column.chunks:
        flat = chunk.flatten().to_numpy(zero_copy_only=False).astype(dtype, copy=False)
        offsets = chunk.offsets.to_numpy()
        for start, stop in pairwise((offsets - offsets[0]).tolist()):
            yield flat[start:stop]


def blob_rows(column: pa.ChunkedArray) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of each row of a binary column; views of Arrow's memory."""
    for chunk in column.chunks:
        if not len(chunk):
            continue
        _, offsets, data = chunk.buffers()
        bounds = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        flat = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
        for start, stop in pairwise(bounds.tolist()):
            yield flat[start:stop]
