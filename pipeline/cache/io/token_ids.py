"""The token ids of a split's sequences, without their targets: that column alone is read."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache.io.reader import Cache

__all__ = ["shard_token_ids"]

_log = logging.getLogger(__name__)


def shard_token_ids(cache: Cache, split: str) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """Yield the path of each shard and the ids of all its tokens, int32 [tokens].

    A few per cent of a shard's bytes. The checksum of the file is not compared, those of the pages
    are; a shard that is missing or damaged is passed over: whoever reads its rows will say so.

    Raises:
        StoreError: the store fails.
    """
    for record in cache.records(split):
        try:
            with cache.store.open(record.path) as file:
                column = pq.read_table(
                    file, columns=["input_ids"], use_threads=False, page_checksum_verification=True
                ).column("input_ids")
        except (pa.ArrowException, OSError) as error:
            _log.debug("%s: its token ids cannot be read (%s)", record.path, error)
            continue
        yield record.path, column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
