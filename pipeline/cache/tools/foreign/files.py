"""Parquet files of another project, at a path or an address: listed, read by row groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = ["ForeignFile", "list_files"]

_DEPTH = 3
"""Folders below the address in which files are looked for."""
_BATCH_ROWS = 64
"""Rows at a time: nested lists are ten times larger in memory than a cache's columns."""
_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class ForeignFile:
    """One file."""

    store: Store
    name: str
    renamed: Mapping[str, str]
    """The file's own name of a column, by the format's."""

    @property
    def url(self) -> str:
        """Its address."""
        return self.store.full_url(self.name)

    def schema(self) -> pa.Schema:
        """Return its columns by the format's names.

        Raises:
            CacheError: it is not Parquet.
        """
        own = {theirs: ours for ours, theirs in self.renamed.items()}
        schema = self._opened().schema_arrow
        return pa.schema([field.with_name(own.get(field.name, field.name)) for field in schema])

    def checksum(self) -> str:
        """Return XXH3-128 of its bytes."""
        digest = xxhash.xxh3_128()
        with self.store.open(self.name) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def batches(self, columns: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
        """Yield all rows, a few at a time.

        Raises:
            CacheError: it is damaged.
        """
        file = self._opened()
        try:
            for batch in file.iter_batches(_BATCH_ROWS, columns=self._theirs(columns, file)):
                yield self._ours(batch)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None

    def rows(
        self, columns: Mapping[str, pa.DataType], rows: NDArray[np.int64]
    ) -> Iterator[pa.RecordBatch]:
        """Yield some rows, ascending, a few at a time; groups of rows without any are not read.

        Raises:
            CacheError: it is damaged.
        """
        file = self._opened()
        try:
            names, stop = self._theirs(columns, file), 0
            for group in range(file.num_row_groups):
                start, stop = stop, stop + file.metadata.row_group(group).num_rows
                if not ((rows >= start) & (rows < stop)).any():
                    continue
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=names):
                    wanted = rows[(rows >= start) & (rows < start + batch.num_rows)] - start
                    if wanted.size:
                        yield self._ours(batch.take(pa.array(wanted)))
                    start += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None

    def _opened(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.store.open(self.name))
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None

    def _theirs(self, columns: Mapping[str, pa.DataType], file: pq.ParquetFile) -> list[str]:
        names = [self.renamed.get(name, name) for name in columns]
        return [name for name in names if name in file.schema_arrow.names]

    def _ours(self, part: pa.RecordBatch) -> pa.RecordBatch:
        own = {theirs: ours for ours, theirs in self.renamed.items()}
        return part.rename_columns([own.get(name, name) for name in part.schema.names])

    def _damaged(self, error: Exception) -> CacheError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return CacheError(f"{self.url}: not readable as Parquet ({lines[0]})")


def list_files(url: str, renamed: Mapping[str, str]) -> list[ForeignFile]:
    """Return the Parquet files at an address, of a folder those in it and below, by name.

    Raises:
        CacheError: there is none.
        StoreError: the store fails.
    """
    if url.endswith(".parquet"):
        folder, _, name = url.rpartition("/")
        store = Store(folder or ("/" if url.startswith("/") else "."))
        names = [name] if store.size(name) is not None else []
    else:
        store = Store(url)
        names = list(_below(store, "", _DEPTH))
    if not names:
        raise CacheError(
            f"{url}: no Parquet file there", expected="a .parquet file, or a folder of them"
        )
    return [ForeignFile(store, name, renamed) for name in names]


def _below(store: Store, folder: str, depth: int) -> Iterator[str]:
    prefix = f"{folder}/" if folder else ""
    for name in store.list(folder):
        if name.endswith(".parquet"):
            yield prefix + name
    for name in store.folders(folder) if depth else ():
        if not name.startswith((".", "_")):
            yield from _below(store, prefix + name, depth - 1)
