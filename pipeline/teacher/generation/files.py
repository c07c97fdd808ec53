"""Files of responses: Parquet that people can read, and that says itself whether it is intact."""

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

from pipeline.cache.layout.embedded_checksum import (
    CHECKSUM_PLACE,
    has_valid_checksum,
    with_checksum,
)
from pipeline.cache.layout.names import RESPONSES
from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.corpus.sample import Sample
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.teacher.generation.base import Written

__all__ = [
    "ReadResponses",
    "ResponseText",
    "decode_responses",
    "encode_responses",
    "prompts_digest",
    "written_files",
]

_KEY = "distill_responses"
_CHECKSUM_KEY = "distill_checksum"
_FIELDS = [
    pa.field("response_id", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("response", pa.string(), nullable=False),
    pa.field("finished", pa.bool_(), nullable=False),
    pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
]
_LOGPROBS = pa.field("logprobs", pa.list_(pa.float32()), nullable=False)
_TOP_IDS = pa.field("top_ids", pa.list_(pa.int32()), nullable=False)
# Only in files with quarantined responses; null for the others.
_ERROR = pa.field("error", pa.string())
_TRIES = pa.field("tries", pa.int32())


_NOTHING = Written(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros((0, 0), np.int32))
"""In the place of a quarantined response."""


@dataclass(frozen=True, slots=True)
class ResponseText:
    """What is kept beside a response's tokens for people."""

    response_id: str
    split: str
    prompt: str
    response: str
    finished: bool
    """Whether the teacher ended it; false where it ran into the limit of new tokens."""


def written_files(store: Store) -> set[str]:
    """Return the paths of the files of responses that are there, by one listing."""
    return {f"{RESPONSES}/{name}" for name in store.list(RESPONSES)}


def prompts_digest(prompts: Sequence[Sample]) -> str:
    """Return a digest of the prompts of a shard: the ids of rows stay when a source is edited."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(prompt.sample_id.encode() + prompt.input_ids.astype("<i4").tobytes())
    return digest.hexdigest()


def encode_responses(
    texts: Sequence[ResponseText],
    written: Sequence[Written | QuarantinedRow],
    *,
    identity_digest: str,
    prompts: str,
) -> bytes:
    """Return the file of one shard; a pure function of its arguments.

    Args:
        texts: of each response.
        written: the tokens of each response (with what is recorded of them, all alike), or why
            there are none.
        identity_digest: of everything that is known before responses are written.
        prompts: `prompts_digest` of what is answered.
    """
    responses = [_NOTHING if isinstance(one, QuarantinedRow) else one for one in written]
    failed = [one if isinstance(one, QuarantinedRow) else None for one in written]
    columns: list[Any] = [
        [text.response_id for text in texts],
        [text.split for text in texts],
        [text.prompt for text in texts],
        [text.response for text in texts],
        [text.finished for text in texts],
        [response.token_ids_N for response in responses],
    ]
    fields = list(_FIELDS)
    if all(response.logprobs_N is not None for response in responses):
        fields.append(_LOGPROBS)
        columns.append([response.logprobs_N for response in responses])
    if all(response.top_ids_NK is not None for response in responses):
        fields.append(_TOP_IDS)
        columns.append([_flat(response.top_ids_NK) for response in responses])
    if any(failed):
        fields += [_ERROR, _TRIES]
        columns += [[one and one.error for one in failed], [one and one.tries for one in failed]]
    schema = pa.schema(fields)
    table = pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, fields, strict=True)],
        schema=schema,
    )
    sink = pa.BufferOutputStream()
    # Without Arrow's own schema the metadata, and so the checksum's place, is there once.
    with pq.ParquetWriter(sink, schema, compression="zstd", store_schema=False) as file:
        file.write_table(table)
        note = json.dumps({"identity_digest": identity_digest, "prompts_digest": prompts})
        file.add_key_value_metadata({_KEY: note, _CHECKSUM_KEY: CHECKSUM_PLACE})
    return with_checksum(bytes(sink.getvalue().to_pybytes()))


@dataclass(frozen=True, slots=True)
class ReadResponses:
    """What a file of responses holds."""

    written: list[Written]
    """Each response; without a token where it is quarantined."""
    quarantined: tuple[QuarantinedRow, ...]


def decode_responses(
    data: bytes, *, where: str, response_ids: Sequence[str], identity_digest: str, prompts: str
) -> ReadResponses | None:
    """Return the responses of a file, or None where it is damaged.

    Args:
        data: the file.
        where: its address, for messages.
        response_ids: the responses it must hold, in order.
        identity_digest: as it was given to `encode_responses`.
        prompts: likewise.

    Raises:
        CacheError: it is intact, and another cache's, or answers other prompts.
    """
    # The bytes first: what is damaged never reaches the Parquet reader.
    if not has_valid_checksum(data):
        return None
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    note = json.loads((file.metadata.metadata or {}).get(_KEY.encode(), b"{}"))
    fields = (_FIELDS[0], _FIELDS[-1], _LOGPROBS, _TOP_IDS, _ERROR, _TRIES)
    wanted = [field.name for field in fields]
    names = [name for name in file.schema_arrow.names if name in wanted]
    table = file.read(names, use_threads=False)
    if note.get("identity_digest") != identity_digest:
        raise CacheError(
            f"{where}: intact, but of another cache",
            expected="responses that were written with these settings",
            do="move that file away, or choose another --cache_dir",
        )
    same = table.column("response_id").to_pylist() == list(response_ids)
    if not same or note.get("prompts_digest") != prompts:
        raise CacheError(
            f"{where}: answers other prompts than those of the corpus",
            expected="the source as it was when the responses were written",
            do="bring the source back, or delete that cache",
        )
    tokens = _lists(table, _FIELDS[-1].name)
    logprobs = _lists(table, _LOGPROBS.name) if _LOGPROBS.name in names else [None] * len(tokens)
    top_ids = _lists(table, _TOP_IDS.name) if _TOP_IDS.name in names else [None] * len(tokens)
    quarantine = ["response_id", _ERROR.name, _TRIES.name]
    errors = table.select(quarantine).to_pylist() if _ERROR.name in names else []
    return ReadResponses(
        [
            Written(ids_N, logprobs_N, None if top is None else top.reshape(len(ids_N), -1))
            if len(ids_N)
            else _NOTHING
            for ids_N, logprobs_N, top in zip(tokens, logprobs, top_ids, strict=True)
        ],
        tuple(
            QuarantinedRow(row["response_id"], row["error"], row["tries"])
            for row in errors
            if row["error"] is not None
        ),
    )


def _flat(ids_NK: NDArray[np.int32] | None) -> NDArray[np.int32]:
    assert ids_NK is not None
    return ids_NK.reshape(-1)


def _lists(table: pa.Table, name: str) -> list[NDArray[Any]]:
    """Return the lists of a column: copies, views would keep the whole file in memory."""
    lists = table.column(name).combine_chunks()
    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
    return [values[start:stop].copy() for start, stop in pairwise(offsets)]
