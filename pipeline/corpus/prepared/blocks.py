"""The files of tokenised samples: Parquet, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.sample import Sample, SplitName
from pipeline.errors import CorpusError

__all__ = ["TokenisedRow", "decode_block", "encode_block"]

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class TokenisedRow:
    """One sample, not yet of a split."""

    sample_id: str
    row: int
    """Of the unit, from 0."""
    part: int
    input_ids: NDArray[np.int32] = field(repr=False)
    loss_mask: NDArray[np.bool_] = field(repr=False)

    def sample(self, split: SplitName, first_row: int) -> Sample:
        """Return it as a sample; `first_row` rows of the source are before its unit."""
        return Sample(
            self.sample_id, split, self.input_ids, self.loss_mask, first_row + self.row, self.part
        )


def encode_block(rows: Sequence[TokenisedRow]) -> bytes:
    """Return the Parquet file of some samples; the same bytes for the same samples."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = b"".join(bytes.fromhex(row.sample_id) for row in rows)
    starts = np.cumsum([0, *(row.input_ids.size for row in rows)]).astype(np.int32)
    empty: list[Any] = [np.zeros(0, np.int32)]
    tokens = np.concatenate([*empty, *(row.input_ids for row in rows)]).astype(np.int32)
    masks = np.concatenate([*empty, *(row.loss_mask for row in rows)]).astype(np.bool_)
    columns = {
        "sample_id": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), len(rows), [None, pa.py_buffer(ids)]
        ),
        "row": pa.array([row.row for row in rows], pa.int64()),
        "part": pa.array([row.part for row in rows], pa.int32()),
        "input_ids": pa.ListArray.from_arrays(pa.array(starts), pa.array(tokens)),
        "loss_mask": pa.ListArray.from_arrays(pa.array(starts), pa.array(masks)),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(columns), sink, compression="zstd", row_group_size=_ROWS_AT_ONCE,
        use_dictionary=False, write_statistics=False, store_schema=False,
    )  # fmt: skip
    return bytes(sink.getvalue().to_pybytes())


def decode_block(data: bytes) -> list[TokenisedRow]:
    """Return the samples of a file whose checksum is right.

    Raises:
        CorpusError: it is no such file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data), use_threads=False).combine_chunks()
        names = table.column("sample_id").to_pylist()
        rows, parts = (table.column(name).to_pylist() for name in ("row", "part"))
        ids, masks = (_lists(table, name) for name in ("input_ids", "loss_mask"))
    except (pa.ArrowException, KeyError) as error:
        raise CorpusError(f"a file of tokenised samples cannot be read ({error})") from error
    return [
        TokenisedRow(bytes(name).hex(), row, part, input_ids, loss_mask)
        for name, row, part, input_ids, loss_mask in zip(
            names, rows, parts, ids, masks, strict=True
        )
    ]


def _lists(table: Any, name: str) -> list[NDArray[Any]]:
    if not table.num_rows:
        return []
    column = table.column(name).combine_chunks()
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[start:stop] for start, stop in pairwise(offsets)]
