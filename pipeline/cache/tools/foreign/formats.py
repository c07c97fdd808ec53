"""Which columns each project's files have, what their lists belong to, what they cannot tell.

Legend: L tokens of a row, M lists of a row, E entries of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cache.tools.foreign.columns import (
    BYTES,
    FLAGS,
    IDS,
    REALS,
    TOKEN_LISTS,
    VALUE_LISTS,
    lists,
    nested,
    token_entries,
    typed,
)
from pipeline.cache.tools.foreign.distillkit import Compression

__all__ = ["FORMATS", "LABELS_OUTSIDE", "Format", "RawRow", "raw_rows"]

_UNSUPERVISED = -100
_MASKS = {"loss_mask": FLAGS, "labels": IDS, "attention_mask": FLAGS}
_LOG_Z = "log Z of temperatures other than 1"
_ENTROPY = "entropy (stored: that of the entries and one tail token, a lower bound)"
LABELS_OUTSIDE = "log-prob of a label outside the entries (stored: an upper bound)"


@dataclass(frozen=True, slots=True)
class Format:
    """One project's files."""

    ids: str
    """The column of token ids of the entries."""
    values: str
    """The column of their log-probs."""
    unknown: tuple[str, ...] = (_LOG_Z, _ENTROPY, LABELS_OUTSIDE)
    lossy: bool = False
    """Its values may sum to more than 1."""
    optional: Mapping[str, pa.DataType] = field(default_factory=lambda: dict(_MASKS))
    packed: bool = False
    """Ids and log-probs are compressed."""

    @property
    def required(self) -> dict[str, pa.DataType]:
        """The columns without which it is not this format."""
        ids, values = (BYTES, BYTES) if self.packed else (TOKEN_LISTS, VALUE_LISTS)
        return {"input_ids": IDS, self.ids: ids, self.values: values}


FORMATS: dict[str, Format] = {
    "plain": Format(
        "target_ids", "target_logprobs", optional={**_MASKS, "label_logprob": REALS}
    ),
    "distillkit": Format(
        "bytepacked_indices",
        "compressed_logprobs",
        unknown=(_LOG_Z, _ENTROPY, LABELS_OUTSIDE, "what its compression has lost"),
        lossy=True,
        packed=True,
    ),
    "axolotl": Format(
        "target_token_ids",
        "target_logprobs",
        unknown=(
            _LOG_Z, _ENTROPY, LABELS_OUTSIDE, "kd_temperature of its preparation (taken to be 1)",
        ),
    ),
    "verl": Format(
        "teacher_topk_indices",
        "teacher_topk_logps",
        optional={**_MASKS, "response_mask": FLAGS, "responses": IDS},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as its file has it, with lists of entries and the tokens they belong to."""

    input_ids_L: NDArray[np.int64]
    loss_mask_L: NDArray[np.bool_]
    tokens_M: NDArray[np.int64]
    """The token that each list is the distribution of."""
    counts_M: NDArray[np.int64]
    ids_E: NDArray[np.int64]
    logprobs_E: NDArray[np.float64]
    label_logprobs: NDArray[np.float64] | None = None
    """Of each supervised token, where the file has it."""


def raw_rows(
    name: str, batch: pa.RecordBatch | pa.Table, compression: Compression | None
) -> Iterator[RawRow | str]:
    """Yield the rows of a batch; of a row that cannot be read what is wrong with it.

    Args:
        name: of the format.
        batch: with its columns by the format's own names.
        compression: of DistillKit's files.

    Raises:
        ValueError: a column that cannot be read as a whole.
    """
    layout = FORMATS[name]
    columns = {column: batch.column(column) for column in batch.schema.names}
    plain = {c: _combined(array) for c, array in columns.items()}
    extras: dict[str, list[Any]] = {}
    for column, kind in {"input_ids": IDS, **layout.optional}.items():
        if column in plain:
            extras[column] = list(lists(_named(column, plain[column], kind)))
    entries = zip(*_entries(layout, plain), strict=True)
    for place, (ids, values) in enumerate(entries):
        row = {column: rows[place] for column, rows in extras.items()}
        yield _row(name, layout, row, ids, values, compression)


_Lists = tuple[NDArray[np.int64], NDArray[Any]]


def _combined(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _named(name: str, column: pa.Array, kind: pa.DataType) -> pa.Array:
    try:
        return typed(column, kind)
    except ValueError as error:
        raise ValueError(f"column {name}: {error}") from None


def _entries(layout: Format, columns: Mapping[str, pa.Array]) -> list[list[_Lists]]:
    ids, values = columns.get(layout.ids), columns[layout.values]
    if ids is None:  # Axolotl's text form
        ids, values = token_entries(values)
    kinds = (BYTES, BYTES) if layout.packed else (TOKEN_LISTS, VALUE_LISTS)
    return [
        list(nested(_named(name, column, kind)))
        for name, column, kind in (
            (layout.ids, ids, kinds[0]), (layout.values, values, kinds[1]),
        )
    ]  # fmt: skip


def _row(
    name: str,
    layout: Format,
    row: Mapping[str, NDArray[Any]],
    ids: _Lists,
    values: _Lists,
    compression: Compression | None,
) -> RawRow | str:
    tokens = row["input_ids"]
    if layout.packed:
        assert compression is not None
        unpacked = _decompressed(ids, values, compression)
        if isinstance(unpacked, str):
            return unpacked
        ids, values = unpacked
    if not np.array_equal(ids[0], values[0]):
        return f"{layout.ids} and {layout.values} differ in length"
    counts_M, ids_E, logprobs_E = ids[0], ids[1], values[1]
    for column in ("loss_mask", "labels", "attention_mask"):
        if column in row and row[column].size != tokens.size:
            return f"{column} has another length than input_ids"
    mask_L = _supervised(row)
    if isinstance(mask_L, str):
        return mask_L
    of_M = _tokens_of(name, counts_M.size, tokens.size, mask_L)
    if isinstance(of_M, str):
        return of_M
    attended_L = row.get("attention_mask", np.ones(tokens.size, np.int8)) != 0
    if not attended_L.all():
        tokens, mask_L, of_M = _without_padding(tokens, mask_L, of_M, attended_L)
    if mask_L is None:
        mask_L = np.zeros(tokens.size, bool)
        mask_L[of_M[(of_M > 0) & (of_M < tokens.size) & (counts_M > 0)]] = True
    mask_L[:1] = False
    labels = row.get("label_logprob")
    if labels is not None and labels.size != mask_L.sum():
        return "label_logprob has another length than there are supervised tokens"
    return RawRow(tokens, mask_L, of_M, counts_M, ids_E, logprobs_E, labels)


def _supervised(row: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_] | str | None:
    """Return which tokens are supervised; None where the file does not say."""
    length = row["input_ids"].size
    if "loss_mask" in row:
        return np.asarray(row["loss_mask"] != 0)
    if "labels" in row:
        return np.asarray(row["labels"] != _UNSUPERVISED)
    given = row.get("response_mask")
    if given is None and "responses" in row:
        given = np.ones(row["responses"].size, np.int8)
    if given is None:
        return None
    if given.size > length:
        return "the response is longer than input_ids"
    mask_L = np.zeros(length, bool)
    mask_L[length - given.size :] = given != 0
    return mask_L


def _tokens_of(
    name: str, count: int, length: int, mask_L: NDArray[np.bool_] | None
) -> NDArray[np.int64] | str:
    """Return the token of each of a row's lists, by the format's way of counting."""
    supervised = None if mask_L is None else np.flatnonzero(mask_L)
    if name == "plain" and supervised is not None and count == supervised.size:
        return supervised
    # Behind a token stands the distribution of the next one: DistillKit, verl.
    first = {"distillkit": 1, "verl": 1}.get(name, length - count)
    fits: Sequence[int] = {"verl": (length,)}.get(name, (length - 1, length))
    if name == "axolotl":
        fits = range(length + 1)  # right-aligned; those of a prompt may be missing
    if count in fits:
        return np.arange(first, first + count)
    wanted = f"{length}" if name == "verl" else f"{length - 1} or {length}"
    more = f", or {supervised.size}, one a supervised token" if supervised is not None else ""
    return f"{count} lists of entries, expected {wanted}{more if name == 'plain' else ''}"


def _without_padding(
    tokens: NDArray[np.int64],
    mask_L: NDArray[np.bool_] | None,
    of_M: NDArray[np.int64],
    attended_L: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None, NDArray[np.int64]]:
    """Leave padding out; lists of what is left out come to belong to no token."""
    place_L = np.where(attended_L, np.cumsum(attended_L) - 1, -1)
    inside_M = (of_M >= 0) & (of_M < tokens.size)
    moved_M = np.where(inside_M, place_L[np.clip(of_M, 0, tokens.size - 1)], -1)
    return tokens[attended_L], None if mask_L is None else mask_L[attended_L], moved_M


def _decompressed(
    ids: _Lists, values: _Lists, compression: Compression
) -> tuple[_Lists, _Lists] | str:
    for what, (sizes_M, _), wanted in (
        ("ids", ids, compression.id_bytes),
        ("log-probs", values, compression.value_bytes),
    ):
        if sizes_M.size and (sizes_M != wanted).any():
            return f"{sizes_M[0]} bytes of {what} a token, by its compression {wanted}"
    number = ids[0].size
    counts_M = np.full(number, compression.k, np.int64)
    ids_MK = compression.ids(ids[1].reshape(number, compression.id_bytes))
    values_MK = compression.logprobs(values[1].reshape(number, compression.value_bytes))
    return (counts_M, ids_MK.reshape(-1)), (counts_M, values_MK.reshape(-1))
