"""Files of responses: Parquet that people can read, and that says itself whether it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.teacher.generator import Written

__all__ = ["FOLDER", "ResponseText", "decode_responses", "encode_responses", "file_name"]

FOLDER = "_meta/responses"
_KEY = b"distil_responses"
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
    note = {"identity_digest": identity_digest, "content_blake2b": _content(table)}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({_KEY: json.dumps(note, sort_keys=True).encode()}),
        sink,
        compression="zstd",
        write_page_checksum=True,
    )
    return bytes(sink.getvalue().to_pybytes())


def decode_responses(
    data: bytes, *, response_ids: Sequence[str], identity_digest: str
) -> list[NDArray[np.int32]] | None:
    """Return the tokens of each response, or None where the file is damaged or another's.

    Args:
        data: the file.
        response_ids: the responses it must hold, in order.
        identity_digest: as it was given to `encode_responses`.
    """
    try:
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        note = json.loads((table.schema.metadata or {})[_KEY])
        whole = note == {"identity_digest": identity_digest, "content_blake2b": _content(table)}
        if not whole or table.column("response_id").to_pylist() != list(response_ids):
            return None
        lists = table.column("token_ids").combine_chunks()
        offsets = lists.offsets.to_numpy()
        values = lists.values.to_numpy()
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None
    # Copies: views would keep the text and everything else of the file in memory.
    parts = [values[start:stop].astype(np.int32) for start, stop in pairwise(offsets)]
    return parts if all(part.size for part in parts) else None


def _content(table: pa.Table) -> str:
    """Hash of what the columns say, whatever pages and encodings they lie in."""
    content = hashlib.blake2b(digest_size=16)
    for name in table.column_names:
        content.update(name.encode() + b"\0")
        column = table.column(name).combine_chunks()
        if pa.types.is_list(column.type):
            content.update(np.diff(column.offsets.to_numpy()).astype("<i8").tobytes())
            content.update(column.flatten().to_numpy().tobytes())
        elif pa.types.is_boolean(column.type):
            content.update(column.to_numpy(zero_copy_only=False).tobytes())
        else:
            for text in column.to_pylist():
                raw = text.encode()
                content.update(b"%d:" % len(raw) + raw)
    return content.hexdigest()
