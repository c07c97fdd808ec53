"""Rows of Arrow tables as Python values, without the nulls that Arrow pads objects with.

All objects of a column have one type, so each gets every field of any of them as a null. What
was absent becomes absent again, at any depth. A map and a JSON column keep their nulls: there
they were written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline.corpus.sources.unfit import JSON, Unfit
from pipeline.errors import CorpusError

__all__ = ["arrow_rows"]

_Cleaner = Callable[[Any], Any]


def arrow_rows(batches: Iterable[Any], name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of record batches or tables, all of one schema.

    Args:
        batches: of `pyarrow`.
        name: of the file or dataset, for messages.

    Raises:
        CorpusError: two columns have one name.
    """
    cleaners: list[_Cleaner | None] | None = None
    names: list[str] = []
    for batch in batches:
        if cleaners is None:
            names = list(map(str, batch.schema.names))
            _require_distinct(names, name)
            cleaners = [_cleaner(field.type) for field in batch.schema]
        columns = [
            _values(column, clean) for column, clean in zip(batch.columns, cleaners, strict=True)
        ]
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))


def _require_distinct(names: list[str], name: str) -> None:
    twice = [column for column, count in Counter(names).items() if count > 1]
    if twice:
        raise CorpusError(
            f"{name}: has the column {twice[0]!r} twice", expected="columns with different names"
        )


def _values(column: Any, clean: _Cleaner | None) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date that Python cannot hold
        values = [_value(scalar) for scalar in column]
    return values if clean is None else [clean(value) for value in values]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return Unfit(f"text that is not UTF-8 ({error.reason})", "not Unicode")
    except (ValueError, OverflowError) as error:
        return Unfit(f"a value of type {scalar.type} that cannot be read ({error})")


def _cleaner(kind: Any) -> _Cleaner | None:
    """Return what brings values of an Arrow type into shape; None where nothing needs it."""
    import pyarrow as pa

    types = pa.types
    if types.is_struct(kind):
        return _struct({field.name: _cleaner(field.type) for field in kind})
    if types.is_map(kind):
        return _map(_cleaner(kind.item_type))
    if isinstance(kind, pa.JsonType):
        return _parse
    if isinstance(kind, pa.BaseExtensionType):
        return _cleaner(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _cleaner(kind.value_type)
    if any(
        is_list(kind)
        for is_list in (
            types.is_list, types.is_large_list, types.is_fixed_size_list,
            types.is_list_view, types.is_large_list_view,
        )
    ):  # fmt: skip
        return _list(_cleaner(kind.value_type))
    return None


def _struct(fields: dict[str, _Cleaner | None]) -> _Cleaner:
    cleaners = [(name, clean) for name, clean in fields.items() if clean is not None]

    def clean_struct(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {name: item for name, item in value.items() if item is not None}
        for name, clean in cleaners:
            if name in kept:
                kept[name] = clean(kept[name])
        return kept

    return clean_struct


def _list(clean: _Cleaner | None) -> _Cleaner | None:
    if clean is None:
        return None

    def clean_list(value: Any) -> Any:
        return [clean(item) for item in value] if isinstance(value, list) else value

    return clean_list


def _map(clean: _Cleaner | None) -> _Cleaner:
    def clean_map(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        pairs: dict[str, Any] = {}
        for key, item in value:
            if not isinstance(key, str):
                return Unfit(f"a map with the key {key!r}")
            if key in pairs:
                return Unfit(f"a map with the key {key!r} twice")
            pairs[key] = item if clean is None else clean(item)
        return pairs

    return clean_map


def _parse(value: Any) -> Any:
    if not isinstance(value, (str, bytes)):
        return value
    try:
        return JSON.decode(value if isinstance(value, str) else value.decode())
    except (ValueError, RecursionError) as error:
        return Unfit(f"a JSON column whose text is not JSON ({error})", "not JSON")
