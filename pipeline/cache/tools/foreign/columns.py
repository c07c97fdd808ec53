"""Columns of Parquet to numpy, row by row: lists, lists of lists, and what is wrong with them.

Legend: S rows, L tokens of a row, M lists of a row, E entries of all lists of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config.nearest import did_you_mean

__all__ = [
    "BYTES", "FLAGS", "IDS", "REALS", "TOKEN_LISTS", "VALUE_LISTS", "lists", "nested",
    "schema_mistakes", "token_entries", "typed",
]  # fmt: skip

IDS, FLAGS, REALS = pa.list_(pa.int64()), pa.list_(pa.int8()), pa.list_(pa.float64())
TOKEN_LISTS, VALUE_LISTS = pa.list_(pa.list_(pa.int64())), pa.list_(pa.list_(pa.float64()))
BYTES = pa.list_(pa.list_(pa.uint8()))
_TOKEN = "token_id:"


def schema_mistakes(
    schema: pa.Schema, required: Mapping[str, pa.DataType], optional: Mapping[str, pa.DataType]
) -> list[str]:
    """Return what is missing or of another type, each as one line.

    Args:
        schema: of a file.
        required: columns by name, and what each has to be convertible to.
        optional: the same of columns that may be missing.
    """
    found = []
    for name, wanted in {**required, **optional}.items():
        if name not in schema.names:
            if name in required:
                near = did_you_mean(name, schema.names)
                found.append(f"no column {name}" + (f"; {near}" if near else ""))
        elif _depth(schema.field(name).type) != _depth(wanted):
            kind = schema.field(name).type
            found.append(f"column {name}: found {kind}, expected {_words(wanted)}")
    return found


def typed(column: pa.Array, wanted: pa.DataType) -> pa.Array:
    """Return a column as the type it has to be.

    Raises:
        ValueError: a value that does not fit, or nothing where a value has to be.
    """
    try:
        column = pa.concat_arrays([column]).cast(wanted)
    except pa.ArrowException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    # A list that is missing has no entries, such as that of a row's first token.
    values = column.values if _depth(wanted) == 1 else column.values.values
    if column.null_count or values.null_count:
        raise ValueError("an empty value (null)")
    return column


def lists(column: pa.ListArray) -> Iterator[NDArray[Any]]:
    """Yield the values of each row of a column of lists."""
    values = column.values.to_numpy(zero_copy_only=False)
    offsets = column.offsets.to_numpy()
    for start, stop in itertools.pairwise(offsets):
        yield values[start:stop]


def nested(column: pa.ListArray) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Yield of each row the lengths of its M lists and their E values; a null list is empty."""
    inner = column.values
    values = inner.values.to_numpy(zero_copy_only=False)
    starts, outer = inner.offsets.to_numpy(), column.offsets.to_numpy()
    for first, last in itertools.pairwise(outer):
        bounds = starts[first : last + 1].astype(np.int64)
        yield np.diff(bounds), values[bounds[0] : bounds[-1]] if bounds.size else values[:0]


def token_entries(column: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Split lists of lists of `{token: "token_id:7", logprob: -0.5}` into ids and log-probs.

    Raises:
        ValueError: another form.
    """
    try:
        inner = column.values
        entries = inner.values
        text = pc.struct_field(entries, "token")
        if not pc.all(pc.starts_with(text, _TOKEN)).as_py() and len(text):
            raise ValueError(f"a token that is not written as {_TOKEN}N")
        ids = pc.cast(pc.utf8_slice_codeunits(text, len(_TOKEN)), pa.int64())
        values = pc.cast(pc.struct_field(entries, "logprob"), pa.float64())
    except (pa.ArrowException, AttributeError) as error:
        raise ValueError(str(error).splitlines()[0]) from None
    inner_ids, inner_values = (
        pa.ListArray.from_arrays(inner.offsets, part) for part in (ids, values)
    )
    return (
        pa.ListArray.from_arrays(column.offsets, inner_ids),
        pa.ListArray.from_arrays(column.offsets, inner_values),
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _depth(kind: pa.DataType) -> int:
    depth = 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth


def _innermost(kind: pa.DataType) -> pa.DataType:
    while _is_list(kind):
        kind = kind.value_type
    return kind


def _words(kind: pa.DataType) -> str:
    inner = _innermost(kind)
    what = "numbers" if pa.types.is_floating(inner) else "integers"
    return f"lists of lists of {what}" if _depth(kind) == 2 else f"a list of {what}"
