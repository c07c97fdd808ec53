"""The files of tokenised samples: Parquet, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.sample import Sample, SplitName, WrittenTokens
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
    written: WrittenTokens | None = field(default=None, repr=False)

    def sample(self, split: SplitName, first_row: int) -> Sample:
        """Return it as a sample; `first_row` rows of the source are before its unit."""
        return Sample(
            self.sample_id, split, self.input_ids, self.loss_mask, first_row + self.row, self.part,
            self.written,
        )  # fmt: skip


def encode_block(rows: Sequence[TokenisedRow]) -> bytes:
    """Return the Parquet file of some samples; the same bytes for the same samples.

    What a writer recorded has columns of its own, which are there where all samples have it.
    """
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
    written = [row.written or WrittenTokens() for row in rows]
    for name, kind, parts in (
        ("written_logprobs", np.float32, [one.logprobs_N for one in written]),
        ("written_top_ids", np.int32, [one.top_ids_NK for one in written]),
    ):
        known = [part.reshape(-1) for part in parts if part is not None]
        if known and len(known) == len(rows):
            ends = pa.array(np.cumsum([0, *(part.size for part in known)]).astype(np.int32))
            columns[name] = pa.ListArray.from_arrays(ends, np.concatenate(known).astype(kind))
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
        written = _written(table, masks)
    except (pa.ArrowException, KeyError) as error:
        raise CorpusError(f"a file of tokenised samples cannot be read ({error})") from error
    return [
        TokenisedRow(bytes(name).hex(), row, part, input_ids, loss_mask, recorded)
        for name, row, part, input_ids, loss_mask, recorded in zip(
            names, rows, parts, ids, masks, written, strict=True
        )
    ]


def _written(table: Any, masks: Sequence[NDArray[np.bool_]]) -> list[WrittenTokens | None]:
    """Return what the writer recorded of each row's supervised tokens."""
    found: dict[str, list[NDArray[Any]]] = {
        name: _lists(table, name) if name in table.column_names else []
        for name in ("written_logprobs", "written_top_ids")
    }
    if not any(found.values()):
        return [None] * len(masks)
    rows: list[WrittenTokens | None] = []
    for row, mask in enumerate(masks):
        logprobs, ids = (found[name][row] if found[name] else None for name in found)
        count = int(mask.sum())
        top_ids = None if ids is None else ids.reshape(count, len(ids) // max(count, 1))
        rows.append(WrittenTokens(logprobs, top_ids))
    return rows


def _lists(table: Any, name: str) -> list[NDArray[Any]]:
    if not table.num_rows:
        return []
    column = table.column(name).combine_chunks()
    offsets = column.offsets.to_numpy()
    values = np.array(column.values.to_numpy(zero_copy_only=False))  # Arrow's are read-only
    return [values[start:stop] for start, stop in pairwise(offsets)]
