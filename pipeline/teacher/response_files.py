"""Files of responses: Parquet that people can read, and that says itself whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache.manifest import checksum
from pipeline.teacher.generator import Written

__all__ = ["FOLDER", "ResponseText", "decode_responses", "encode_responses", "file_name"]

FOLDER = "_meta/responses"
_KEY = "distil_responses"
# XXH3-128 of the whole file with zeros in the checksum's own place, which is in the footer.
_CHECKSUM_KEY = "distil_checksum"
_MARK = b"xxh3-128:"
_ZEROS = b"0" * 32
_FIELDS = [
    pa.field("response_id", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("response", pa.string(), nullable=False),
    pa.field("finished", pa.bool_(), nullable=False),
    pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
]
_LOGPROBS = pa.field("logprobs", pa.list_(pa.float32()), nullable=False)


@dataclass(frozen=True, slots=True)
class ResponseText:
    """What stands beside a response's tokens for people."""

    response_id: str
    split: str
    prompt: str
    response: str
    finished: bool
    """Whether the teacher ended it; false where it ran into the limit of new tokens."""


def file_name(index: int) -> str:
    """Return the path of one shard of responses inside the cache."""
    return f"{FOLDER}/{index:05d}.parquet"


def encode_responses(
    texts: Sequence[ResponseText], written: Sequence[Written], *, identity_digest: str
) -> bytes:
    """Return the file of one shard; a pure function of its arguments.

    Args:
        texts: of each response.
        written: the tokens of each response; all with log-probs, or none.
        identity_digest: of everything that is known before responses are written.
    """
    columns: list[Any] = [
        [text.response_id for text in texts],
        [text.split for text in texts],
        [text.prompt for text in texts],
        [text.response for text in texts],
        [text.finished for text in texts],
        [response.token_ids_N for response in written],
    ]
    fields = list(_FIELDS)
    logprobs = [r.logprobs_N for r in written if r.logprobs_N is not None]
    if logprobs:
        fields.append(_LOGPROBS)
        columns.append(logprobs)
    schema = pa.schema(fields)
    table = pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, fields, strict=True)],
        schema=schema,
    )
    sink = pa.BufferOutputStream()
    # Without Arrow's own schema the metadata, and so the checksum's place, stands there once.
    with pq.ParquetWriter(sink, schema, compression="zstd", store_schema=False) as file:
        file.write_table(table)
        note = json.dumps({"identity_digest": identity_digest})
        file.add_key_value_metadata({_KEY: note, _CHECKSUM_KEY: (_MARK + _ZEROS).decode()})
    data = bytes(sink.getvalue().to_pybytes())
    at = data.rfind(_MARK) + len(_MARK)
    assert data[at : at + len(_ZEROS)] == _ZEROS
    return _with_checksum(data, at, checksum(data).encode())


def decode_responses(
    data: bytes, *, response_ids: Sequence[str], identity_digest: str
) -> list[NDArray[np.int32]] | None:
    """Return the tokens of each response, or None where the file is damaged or another's.

    Args:
        data: the file.
        response_ids: the responses it must hold, in order.
        identity_digest: as it was given to `encode_responses`.
    """
    # The bytes first: what is damaged never reaches the Parquet reader.
    at = data.rfind(_MARK) + len(_MARK)
    stored = data[at : at + len(_ZEROS)]
    if checksum(_with_checksum(data, at, _ZEROS)).encode() != stored:
        return None
    file = pq.ParquetFile(pa.BufferReader(data))
    note = json.loads((file.metadata.metadata or {}).get(_KEY.encode(), b"{}"))
    table = file.read(["response_id", "token_ids"])
    if note.get("identity_digest") != identity_digest:
        return None
    if table.column("response_id").to_pylist() != list(response_ids):
        return None
    lists = table.column("token_ids").combine_chunks()
    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
    # Copies: views would keep the text and everything else of the file in memory.
    parts = [values[start:stop].astype(np.int32) for start, stop in pairwise(offsets)]
    return parts


def _with_checksum(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]
