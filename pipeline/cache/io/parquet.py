"""A shard's table to Parquet bytes and back; all options of the file are set here."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["parquet_bytes", "parquet_table"]

_ROW_GROUP_ROWS = 1024
_SMALL_LEVEL = 13
_SMALL = ("always_kept_counts", "sampled_counts", "sampled_ids_3", "entropy")
"""zstd level of the small streams: an optimal-parsing level saves 0.12 of 20 bytes a token, for a
tenth of the encoding time; on the large streams it would halve the rate."""
_BLOB_ENCODING = "DELTA_LENGTH_BYTE_ARRAY"
"""Packed lengths in front of the bytes. With PLAIN, four bytes before each row's value, they take 3
% of a cache of sampled targets (twenty columns of a hundred bytes a row), and zstd compresses the
rest worse."""
_ZSTD_LEVEL = 1
"""zstd level of the symbol streams: level 3 takes 2 % more, because its matches cost more than they
save."""


def parquet_bytes(table: pa.Table) -> bytes:
    """Return the file of a table; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    blobs = [item.name for item in table.schema if item.type == pa.binary()]
    # Numbers are PLAIN: DuckDB 2.0 cannot read BYTE_STREAM_SPLIT over float16.
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=_levels(table.schema),
        row_group_size=_ROW_GROUP_ROWS,
        use_dictionary=False,
        column_encoding=dict.fromkeys(blobs, _BLOB_ENCODING),
        write_page_checksum=True,
        write_statistics=["num_tokens", "num_loss_tokens"],
    )
    return bytes(sink.getvalue().to_pybytes())


def _levels(schema: pa.Schema) -> dict[str, int]:
    """Return zstd's level for each column, by its path in the file."""
    return {
        f"{item.name}.list.element" if pa.types.is_list(item.type) else item.name: (
            _SMALL_LEVEL if item.name in _SMALL else _ZSTD_LEVEL
        )
        for item in schema
    }


def parquet_table(data: bytes, columns: Sequence[str]) -> pa.Table:
    """Return the named columns of a file, read by the calling thread alone.

    Arrow's own threads would hold references to `data`; one that drops its reference while the
    interpreter shuts down aborts the process ("terminate called without an active exception", seen
    once in some hundred runs of `verify`). Our own threads read shards in parallel anyway.

    Raises:
        pyarrow.ArrowException, OSError, KeyError: not Parquet, damaged, or a column is missing.
    """
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise KeyError(f"no column {', '.join(missing)}")
    return file.read(list(columns), use_threads=False)
